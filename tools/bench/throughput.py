"""`quire bench throughput`: a trace, all requests submitted at once, output tokens per second.

Token ids are drawn anew for every repetition, so that no repetition finds the prefixes of another.
Greedy, end of sequence ignored, no text: the method of data/peers_h200.json.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import TYPE_CHECKING, Any

from ...config import EngineConfig
from ..flags import from_zero, positive
from .models import add_engine, context_of, engine_config
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    from collections import Counter

    from ...model.plan import Bucket
    from ...sched.stats import EngineStats
    from .engine_run import Run, TokenEngine
    from .trace import Trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--trace",
        default="sharegpt-like",
        metavar="FILE",
        help="JSON list of [prompt tokens, output tokens], or the shipped sharegpt-like (default)",
    )
    group.add_argument("--requests", type=positive, metavar="N", help="its first N (default: all)")
    group.add_argument(
        "--clip", action="store_true", help="shorten requests that are too long for the model"
    )
    group.add_argument("--repeat", type=positive, default=3, metavar="N", help="(default: 3)")
    group.add_argument("--seed", type=from_zero, default=0, help="of the token ids (default: 0)")
    add_output(parser)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    config = engine_config(args)
    from .trace import read_trace

    trace = read_trace(args.trace).first(args.requests)
    if not args.clip:
        trace.fitted(context_of(config), clip=False)  # refused before anything is loaded
    settings, trace, repetitions = measure(config, trace, args.clip, args.repeat, args.seed)
    rates = [r["output_tok_s"] for r in repetitions]
    results = {
        "settings": settings,
        "trace": {
            "name": trace.name,
            "requests": len(trace),
            "clipped": trace.clipped,
            "prompt_tokens": sum(trace.prompts),
            "output_tokens": sum(trace.outputs),
            "seed": args.seed,
        },
        "repetitions": repetitions,
        "output_tok_s": {"best": max(rates), "median": median(rates)},
    }
    finish(args, results, [_table(results)], lambda figure: _draw(figure, results))


def measure(
    config: EngineConfig, trace: Trace, clip: bool, repeat: int, seed: int
) -> tuple[dict[str, Any], Trace, list[dict[str, Any]]]:
    """Runs the trace `repeat` times on one engine: its settings, what ran, and the figures."""
    import numpy as np

    from ...serving.progress import Terminal
    from .engine_run import TokenEngine
    from .trace import draw_prompts

    draw = np.random.default_rng(seed)
    repetitions = []
    with TokenEngine(config, Terminal()) as engine:
        trace = trace.fitted(engine.longest, clip=clip)
        for at in range(repeat):
            prompts = draw_prompts(trace.prompts, engine.vocab, draw)
            before, buckets = engine.stats(), engine.buckets.copy()
            run = engine.run(prompts, trace.outputs, f"run {at + 1} of {repeat}")
            repetitions.append(_figures(engine, trace, run, before, engine.buckets - buckets))
        return engine.described(), trace, repetitions


def _figures(
    engine: TokenEngine,
    trace: Trace,
    run: Run,
    before: EngineStats,
    buckets: Counter[Bucket],
) -> dict[str, Any]:
    """One repetition's."""
    import numpy as np

    after = engine.stats()
    output, prompt = sum(trace.outputs), sum(trace.prompts)
    real = after.real_tokens - before.real_tokens
    padded = after.padded_tokens - before.padded_tokens
    return {
        "seconds": run.seconds,
        "output_tok_s": output / run.seconds,
        "total_tok_s": (output + prompt) / run.seconds,
        "steps": after.steps - before.steps,
        "steps_by_bucket": {bucket_name(b): count for b, count in sorted(buckets.items())},
        "padding_waste": 1 - real / padded,
        "page_waste_since_start": after.waste,
        "prefix_hit_tokens": after.prefix_hit_tokens - before.prefix_hit_tokens,
        "preemptions": after.preemptions - before.preemptions,
        "recomputed_tokens": after.recomputed_tokens - before.recomputed_tokens,
        "compiles_after_ready": engine.parts.runner.compiles_after_ready,
        "first_token_s_p50": float(np.percentile(run.first, 50)),
    }


def bucket_name(bucket: Any) -> str:
    """ "2048 tokens x 256 rows, greedy"."""
    k = f", k={bucket.k}" if bucket.k > 1 else ""
    return f"{bucket.tokens} tokens x {bucket.rows} rows, {bucket.sampler.name.lower()}{k}"


def _table(results: dict[str, Any]) -> Any:
    repetitions = results["repetitions"]
    count = len(repetitions)
    title = f"throughput: {results['settings']['model']}, {results['trace']['requests']} requests"
    made = table(title, "", *(f"run {at + 1}" for at in range(count)))
    forms = {
        "output_tok_s": "{:,.0f}",
        "total_tok_s": "{:,.0f}",
        "seconds": "{:.2f}",
        "steps": "{:,}",
        "padding_waste": "{:.1%}",
        "page_waste_since_start": "{:.1%}",
        "prefix_hit_tokens": "{:,}",
        "preemptions": "{:,}",
        "recomputed_tokens": "{:,}",
        "compiles_after_ready": "{}",
    }
    for name, form in forms.items():
        made.add_row(name.replace("_", " "), *(form.format(r[name]) for r in repetitions))
    for name in sorted({name for r in repetitions for name in r["steps_by_bucket"]}):
        cells = [f"{r['steps_by_bucket'].get(name, 0):,}" for r in repetitions]
        made.add_row(f"steps of {name}", *cells)
    rate = results["output_tok_s"]
    made.add_row("output tok/s, best", f"{rate['best']:,.0f}")
    made.add_row("output tok/s, median", f"{rate['median']:,.0f}")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    axes = figure.subplots()
    rates = [r["output_tok_s"] for r in results["repetitions"]]
    bars = axes.bar([f"run {at + 1}" for at in range(len(rates))], rates)
    axes.bar_label(bars, fmt="{:,.0f}")
    half = max(len(rates), 4) / 2  # few bars are no wider than several
    axes.set_xlim((len(rates) - 1) / 2 - half, (len(rates) - 1) / 2 + half)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("output tokens per second")
    axes.set_title(f"{results['settings']['model']}, {results['trace']['name']}")
