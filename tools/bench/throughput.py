"""`quire bench throughput`: a trace, all requests submitted at once, output tokens per second; or a
closed loop over it, with so many under way as --concurrency says.

Token ids are drawn anew for every repetition, so that no repetition finds the prefixes of another.
Greedy, end of sequence ignored, no text: the method of data/peers_h200.json.
"""

from __future__ import annotations

import argparse
import csv
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ...config import EngineConfig
from ...errors import InvalidConfig
from ..flags import from_zero, positive
from .models import add_engine, context_of, engine_config
from .report import add_output, check_output, finish, table
from .trace import Trace, add_trace, draw_prompts, read_trace

if TYPE_CHECKING:
    from ...sched.stats import EngineStats
    from .engine_run import Run, TokenEngine
    from .step_clock import Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    add_trace(group, clip=True)
    group.add_argument("--requests", type=positive, metavar="N", help="its first N (default: all)")
    group.add_argument("--repeat", type=positive, default=3, metavar="N", help="(default: 3)")
    group.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="requests under way at most, each that ends is followed by the next (default: all)",
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of the token ids (default: 0)")
    group.add_argument(
        "--steps",
        metavar="FILE",
        help="also write every step, what it had to do and its milliseconds, into a .csv",
    )
    add_output(parser)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    _check_steps(args.steps)
    config = engine_config(args)

    trace = read_trace(args.trace).first(args.requests)
    if not args.clip:
        trace.fitted(context_of(config), clip=False)  # refused before anything is loaded
    settings, trace, repetitions = measure(config, trace, args)
    rates = [r["output_tok_s"] for r in repetitions]
    results = {
        "settings": settings,
        "trace": trace.described(args.seed),
        "concurrency": args.concurrency,
        "repetitions": repetitions,
        "output_tok_s": {"best": max(rates), "median": median(rates)},
    }
    finish(args, results, [_table(results)], lambda figure: _draw(figure, results))


def measure(
    config: EngineConfig, trace: Trace, args: argparse.Namespace
) -> tuple[dict[str, Any], Trace, list[dict[str, Any]]]:
    """Runs the trace `repeat` times on one engine: its settings, what ran, and the figures."""
    import numpy as np

    from ...serving.progress import Terminal
    from .engine_run import TokenEngine

    draw, repetitions, steps = np.random.default_rng(args.seed), [], []
    with TokenEngine(config, Terminal()) as engine:
        trace = trace.fitted(engine.longest, clip=args.clip)
        for at in range(args.repeat):
            prompts = draw_prompts(trace.prompts, engine.vocab, draw)
            name = f"run {at + 1} of {args.repeat}"
            before = engine.stats()
            run = engine.run(prompts, trace.outputs, name, args.concurrency)
            repetitions.append(_figures(engine, trace, run, before))
            steps.append(run.steps)
        if args.steps is not None:
            _write_steps(args.steps, steps)
        return engine.described(), trace, repetitions


def _figures(engine: TokenEngine, trace: Trace, run: Run, before: EngineStats) -> dict[str, Any]:
    """One repetition's."""
    import numpy as np

    from .step_clock import bucket_name, by_bucket

    after = engine.stats()
    output, prompt = sum(trace.outputs), sum(trace.prompts)
    real = after.real_tokens - before.real_tokens
    padded = after.padded_tokens - before.padded_tokens
    waits = np.subtract(run.first, run.sent)
    return {
        "seconds": run.seconds,
        "output_tok_s": output / run.seconds,
        "total_tok_s": (output + prompt) / run.seconds,
        "steps": after.steps - before.steps,
        "steps_by_bucket": {bucket_name(b): found for b, found in by_bucket(run.steps).items()},
        "steps_ms": 1e3 * sum(step.seconds for step in run.steps),
        "padding_waste": 1 - real / padded,
        "page_waste_since_start": after.waste,
        "prefix_hit_tokens": after.prefix_hit_tokens - before.prefix_hit_tokens,
        "preemptions": after.preemptions - before.preemptions,
        "recomputed_tokens": after.recomputed_tokens - before.recomputed_tokens,
        "compiles_after_ready": engine.parts.runner.compiles_after_ready,
        "first_token_s_p50": float(np.percentile(waits, 50)),
    }


def _check_steps(file: str | None) -> None:
    """Before the minutes that a run takes."""
    if file is not None and not Path(file).expanduser().resolve().parent.is_dir():
        raise InvalidConfig(f"--steps: got {file!r}, must be in a folder that exists")


def _write_steps(file: str, repetitions: list[list[Step]]) -> None:
    """A line a step."""
    from .step_clock import Work

    names = [name for name in Work._fields if name != "bucket"]
    with Path(file).expanduser().open("w", newline="", encoding="utf-8") as opened:
        out = csv.writer(opened)
        out.writerow(["run", "bucket_tokens", "bucket_rows", "sampler", "k", *names, "ms"])
        for at, steps in enumerate(repetitions):
            for (bucket, *work), seconds in steps:
                shape = [bucket.tokens, bucket.rows, bucket.sampler.name.lower(), bucket.k]
                out.writerow([at + 1, *shape, *work, f"{1e3 * seconds:.4f}"])


def _table(results: dict[str, Any]) -> Any:
    repetitions = results["repetitions"]
    count, most = len(repetitions), results["concurrency"]
    title = f"throughput: {results['settings']['model']}, {results['trace']['requests']} requests"
    title += f", {most} at once" if most else ""
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
    # A run may lack what another has, and buckets shall stand in their order.
    longest = max(repetitions, key=lambda r: len(r["steps_by_bucket"]))["steps_by_bucket"]
    for name in dict.fromkeys(chain(longest, *(r["steps_by_bucket"] for r in repetitions))):
        cells = [_steps_cell(r["steps_by_bucket"].get(name)) for r in repetitions]
        made.add_row(f"steps of {name}: count, median ms, s in all", *cells)
    made.add_row("all steps, s", *(f"{r['steps_ms'] / 1e3:.2f}" for r in repetitions))
    rate = results["output_tok_s"]
    made.add_row("output tok/s, best", f"{rate['best']:,.0f}")
    made.add_row("output tok/s, median", f"{rate['median']:,.0f}")
    return made


def _steps_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return f"{found['count']:,}  {found['median_ms']:6.2f}  {found['sum_ms'] / 1e3:6.2f}"


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
