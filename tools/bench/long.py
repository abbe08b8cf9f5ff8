"""`quire bench long`: one very long prompt, the first time and again from the prefix cache.

    cold     time to the first token; each chunk's time, from when the device could begin with it
    again    median of 5: the time to the first token, and how much of it passed before the step was
             launched (the request is checked, its prefix looked up, its pages listed)
    decode   one request after the prompt, so many tokens into its context

Beyond the context that a model was made for it needs --max-model-len and --lift-context-limit.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import TYPE_CHECKING, Any

from ...errors import InvalidConfig
from ..flags import from_zero, positive
from .models import add_engine, check_fits, engine_config
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    from ...serving.progress import Reporter
    from .engine_run import Run, TokenEngine

TIMES = 5
DECODED = 17
"""Output tokens of the decode measurement; the first comes with the prompt."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--prompt-tokens", type=positive, default=200_000, metavar="N", help="(default: 200000)"
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of the token ids (default: 0)")
    add_output(parser)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    config = engine_config(args)
    if not config.prefix_caching:
        raise InvalidConfig("prefix_caching: is off, and must be on for this benchmark")
    check_fits(config, "prompt_tokens", args.prompt_tokens, DECODED)
    import numpy as np

    from ...serving.progress import Terminal
    from .engine_run import TokenEngine
    from .trace import draw_prompts

    reporter = Terminal()
    with TokenEngine(config, reporter) as engine:
        draw = np.random.default_rng(args.seed)
        (prompt,) = draw_prompts([args.prompt_tokens], engine.vocab, draw)
        results = {
            "settings": engine.described(),
            "prompt_tokens": args.prompt_tokens,
            **_measure(engine, prompt, reporter),
            "compiles_after_ready": engine.parts.runner.compiles_after_ready,
        }
    finish(args, results, [_table(results)], lambda figure: _draw(figure, results))


def _measure(engine: TokenEngine, prompt: tuple[int, ...], reporter: Reporter) -> dict[str, Any]:
    spec = engine.parts.sizes.spec
    with reporter.phase("first token") as update:
        cold, _ = engine.first_token(prompt, lambda run: update(_computed(run), len(prompt)))
    before = engine.stats().prefix_hit_tokens
    again, to_launch, launching = [], [], []
    for _ in range(TIMES):
        run, parts = engine.first_token(prompt)
        again.append(1e3 * run.seconds)
        to_launch.append(1e3 * parts["before"])
        launching.append(1e3 * parts["launch"])
    found = (engine.stats().prefix_hit_tokens - before) // TIMES
    decode = [engine.run([prompt], [DECODED]) for _ in range(TIMES)]
    pages = -(-len(prompt) // spec.page_size)
    page_bytes = spec.page_size * engine.parts.sizes.token_bytes
    return {
        "cold_ms": 1e3 * cold.seconds,
        "chunks": [  # each step has the one prompt's chunk alone, which reads all up to its end
            {"start": work.prompt_reads - work.tokens, "tokens": work.tokens, "ms": 1e3 * seconds}
            for work, seconds in cold.steps
        ],
        "hit_ms": {"median": median(again), "best": min(again), "all": again},
        "hit_tokens": found,
        "hit_parts_ms": {"to_launch": median(to_launch), "launch": median(launching)},
        "decode_step_ms": median(
            1e3 * (run.last[0] - run.first[0]) / (DECODED - 1) for run in decode
        ),
        "prompt_pages": pages,
        "prompt_kv_bytes": pages * page_bytes,
    }


def _computed(run: Run) -> int:
    """Tokens of the prompt so far."""
    return sum(step.work.tokens for step in list(run.steps))  # the engine's thread adds to them


def _table(results: dict[str, Any]) -> Any:
    chunks, parts = results["chunks"], results["hit_parts_ms"]
    tokens = results["prompt_tokens"]
    made = table(f"long: {results['settings']['model']}, {tokens:,} tokens", "", "ms", "")
    made.add_row("first token, cold", f"{results['cold_ms']:,.1f}")
    for at in sorted({0, len(chunks) // 4, len(chunks) // 2, 3 * len(chunks) // 4}):
        made.add_row(_chunk_name(at, chunks), f"{chunks[at]['ms']:,.2f}")
    made.add_row(_chunk_name(len(chunks) - 1, chunks), f"{chunks[-1]['ms']:,.2f}")
    hit = results["hit_ms"]
    made.add_row(f"again, {results['hit_tokens']:,} tokens found", f"{hit['median']:,.2f}")
    made.add_row("  the best", f"{hit['best']:,.2f}")
    made.add_row("  until its step was launched", f"{parts['to_launch']:,.2f}")
    made.add_row("  launching", f"{parts['launch']:,.2f}")
    made.add_row("decode step after it", f"{results['decode_step_ms']:,.2f}")
    held = results["prompt_kv_bytes"] / 2**30
    made.add_row(f"its KV: {results['prompt_pages']:,} pages, GiB", f"{held:,.3f}")
    made.add_row("compiles after ready", str(results["compiles_after_ready"]))
    return made


def _chunk_name(at: int, chunks: list[dict[str, Any]]) -> str:
    chunk = chunks[at]
    return f"  chunk {at + 1} of {len(chunks)}: {chunk['tokens']:,} tokens after {chunk['start']:,}"


def _draw(figure: Any, results: dict[str, Any]) -> None:
    """How a chunk's time grows with what lies before it."""
    axes = figure.subplots()
    chunks = results["chunks"]
    axes.plot([c["start"] for c in chunks], [c["ms"] for c in chunks], marker=".")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel="tokens before the chunk",
        ylabel="ms",
        ylim=(0, None),
        title=f"{results['prompt_tokens']:,} tokens: cold {results['cold_ms']:,.0f} ms, "
        f"again {results['hit_ms']['median']:,.1f} ms",
    )
