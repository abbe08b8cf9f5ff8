"""`quire bench latency`: decode step by batch, time to first token, prefix hits.

    decode step   (time of N output tokens - time of 16) / (N - 16), a batch submitted together
    first token   one request on an idle engine, one output token, median of 5
    prefix hit    one request of 10,000 tokens: the first time, then the median of 5 repeats

With the last two goes where the host was meanwhile (`parts`, medians; PARTS in engine_run.py).

The methods of data/peers_h200.json; token ids are random and drawn anew.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from statistics import median
from typing import TYPE_CHECKING, Any

from ..flags import from_zero, positive, positives
from .models import add_engine, check_fits, engine_config
from .report import add_output, check_output, finish, over_sizes, table

if TYPE_CHECKING:
    from .engine_run import TokenEngine

SHORT = 16
"""Output tokens of the run that is taken off: prefill and start."""

TIMES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--batch",
        type=positives,
        default=(1, 8, 64),
        metavar="LIST",
        help="requests decoding at once (default: 1,8,64)",
    )
    group.add_argument(
        "--prompt-tokens", type=positive, default=128, metavar="N", help="of each (default: 128)"
    )
    group.add_argument(
        "--output-tokens", type=positive, default=272, metavar="N", help="above 16 (default: 272)"
    )
    group.add_argument(
        "--ttft-tokens",
        type=positives,
        default=(128, 1024, 8192),
        metavar="LIST",
        help="prompt lengths for the time to first token (default: 128,1024,8192)",
    )
    group.add_argument(
        "--prefix-tokens",
        type=from_zero,
        default=10_000,
        metavar="N",
        help="prompt of the prefix measurement; 0 leaves it out (default: 10000)",
    )
    group.add_argument(
        "--repeat", type=positive, default=3, metavar="N", help="decode measurements (default: 3)"
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of the token ids (default: 0)")
    add_output(parser)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    config = engine_config(args)
    _check(args)
    # The others say what they leave out: their defaults are for long contexts.
    check_fits(config, "prompt_tokens", args.prompt_tokens, args.output_tokens)
    from ...serving.progress import Terminal
    from .engine_run import TokenEngine

    with TokenEngine(config, Terminal()) as engine:
        bench = _Latency(engine, args)
        results = {
            "settings": engine.described(),
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "decode_step_ms": bench.each(args.batch, bench.decode),
            "ttft_ms": bench.each(args.ttft_tokens, bench.first_token),
            "prefix_ms": bench.prefix(args.prefix_tokens),
            "left_out": bench.left_out,
            "compiles_after_ready": engine.parts.runner.compiles_after_ready,
        }
    finish(args, results, [_table(results)], lambda figure: _draw(figure, results))


def _check(args: argparse.Namespace) -> None:
    from ...errors import InvalidConfig

    for name, low in {"output_tokens": SHORT + 1, "prefix_tokens": 0}.items():
        if getattr(args, name) < low:
            raise InvalidConfig(f"{name}: got {getattr(args, name)}, must be at least {low}")


class _Latency:
    """The three measurements on one engine."""

    def __init__(self, engine: TokenEngine, args: argparse.Namespace):
        import numpy as np

        self._engine, self._args = engine, args
        self._draw = np.random.default_rng(args.seed)
        self._found: list[dict[str, float]] = []  # seconds by part, of each request by itself
        self.left_out: list[str] = []
        """What this engine cannot run, and why: said, not skipped in silence."""

    def each(
        self, values: Iterable[int], measure: Callable[[int], dict[str, Any] | None]
    ) -> dict[str, Any]:
        """`measure` of every value that the engine can serve, by value."""
        found = {}
        for value in values:
            if (figures := measure(value)) is not None:
                found[str(value)] = figures
        return found

    def decode(self, batch: int) -> dict[str, Any] | None:
        args = self._args
        slots = self._engine.parts.sizes.spec.num_slots
        if batch > slots:
            self.left_out.append(f"batch {batch}: the engine runs {slots} requests at once")
            return None
        if not self._fits(f"batch {batch}", args.prompt_tokens + args.output_tokens):
            return None
        steps = []
        for at in range(args.repeat):
            seconds = []
            for length in (args.output_tokens, SHORT):
                bar = f"batch {batch}, {at + 1} of {args.repeat}" if length > SHORT else ""
                run = self._engine.run(self._prompts(batch), [length] * batch, bar)
                seconds.append(run.seconds)
            steps.append(1e3 * (seconds[0] - seconds[1]) / (args.output_tokens - SHORT))
        return _spread(steps)

    def first_token(self, length: int) -> dict[str, Any] | None:
        if not self._fits(f"ttft {length}", length + 1):
            return None
        times = [self._one(self._prompts(1, length)[0]) for _ in range(TIMES)]
        return {**_spread(times), "parts": self._parts()}

    def prefix(self, length: int) -> dict[str, Any] | None:
        if not length or not self._fits(f"prefix {length}", length + 1):
            return None
        if not self._engine.config.prefix_caching:
            self.left_out.append("prefix: prefix caching is off")
            return None
        (prompt,) = self._prompts(1, length)
        cold = self._one(prompt)
        before = self._engine.stats().prefix_hit_tokens
        hits = [self._one(prompt) for _ in range(TIMES)]
        found = self._engine.stats().prefix_hit_tokens - before
        return {
            "tokens": length,
            "cold": cold,
            "hit": median(hits),
            "all_hits": hits,
            "hit_parts": self._parts(),
            "hit_tokens": found // TIMES,
        }

    def _one(self, prompt: tuple[int, ...]) -> float:
        """Milliseconds from submission to the only token."""
        run, parts = self._engine.first_token(prompt)
        self._found.append(parts)
        return 1e3 * run.seconds

    def _parts(self) -> dict[str, float]:
        """Milliseconds of each part of the last TIMES requests, medians."""
        last = self._found[-TIMES:]
        return {part: 1e3 * median(found[part] for found in last) for part in last[0]}

    def _prompts(self, count: int, length: int | None = None) -> list[tuple[int, ...]]:
        from .trace import draw_prompts

        lengths = [length or self._args.prompt_tokens] * count
        return draw_prompts(lengths, self._engine.vocab, self._draw)

    def _fits(self, what: str, tokens: int) -> bool:
        if tokens > self._engine.longest:
            self.left_out.append(
                f"{what}: needs {tokens} tokens, the engine's limit is {self._engine.longest}"
            )
        return tokens <= self._engine.longest


def _table(results: dict[str, Any]) -> Any:
    made = table(f"latency: {results['settings']['model']}", "", "median ms", "best ms")
    for batch, found in results["decode_step_ms"].items():
        made.add_row(f"decode step, batch {batch}", *_two(found))
    for length, found in results["ttft_ms"].items():
        made.add_row(f"first token, {length} prompt tokens", *_two(found))
    if (prefix := results["prefix_ms"]) is not None:
        made.add_row(f"prefix of {prefix['tokens']}, cold", f"{prefix['cold']:.2f}")
        hit = f"prefix of {prefix['tokens']}, hit on {prefix['hit_tokens']}"
        made.add_row(hit, f"{prefix['hit']:.2f}", f"{min(prefix['all_hits']):.2f}")
    parts = {f"first token, {n} tokens": f["parts"] for n, f in results["ttft_ms"].items()}
    if prefix is not None:
        parts["prefix hit"] = prefix["hit_parts"]
    for name, found in parts.items():
        made.add_row(f"{name}: {', '.join(found)}", *[" ".join(f"{v:.2f}" for v in found.values())])
    made.add_row("compiles after ready", str(results["compiles_after_ready"]))
    for text in results["left_out"]:
        made.add_row(f"left out: {text}")
    return made


def _spread(times: list[float]) -> dict[str, Any]:
    return {"median": median(times), "best": min(times), "all": times}


def _two(found: dict[str, Any]) -> tuple[str, str]:
    return f"{found['median']:.3f}", f"{found['best']:.3f}"


def _draw(figure: Any, results: dict[str, Any]) -> None:
    parts = {
        "decode_step_ms": ("decode step by batch", "requests decoding"),
        "ttft_ms": ("time to first token", "prompt tokens"),
    }
    for axes, (name, (title, label)) in zip(figure.subplots(1, 2), parts.items(), strict=True):
        sizes = [int(size) for size in results[name]]
        axes.plot(sizes, [figures["median"] for figures in results[name].values()], marker="o")
        axes.set_title(title)
        over_sizes(axes, sizes, x=label, y="ms")
