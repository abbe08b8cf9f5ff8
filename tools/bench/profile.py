"""`quire bench profile`: where each millisecond of decode steps, prompts and mixtures goes.

Each scenario runs on one engine under JAX's profiler. Read off the streams of a GPU (the first, of
several) are the union of kernel intervals over the time from the first to the last of them (memory
copies do not count), and the time of each kind of kernel per step. With --keep the traces stay, for
tools that draw them.

    decode N     the second half of N requests' 128 output tokens, all decoding by then
    first N      a prompt of N tokens, one output token
    hit N        the same once more, from the prefix cache
    mixed        the first 120 requests of the trace sharegpt-like, shortened where they must be
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidConfig
from ..flags import positives
from .models import add_engine, engine_config
from .report import add_output, check_output, finish, table
from .throughput import bucket_name

if TYPE_CHECKING:
    from ...config import EngineConfig
    from ...serving.progress import Reporter
    from .engine_run import TokenEngine

Interval = tuple[str, float, float]
"""Kernel, begin and end in milliseconds."""

DECODE_TOKENS = 128
MIXED_REQUESTS = 120
SHOWN = 12  # kinds of kernels in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--batch", type=positives, default=(1, 64, 256), metavar="LIST",
        help="requests decoding at once (default: 1,64,256)",
    )  # fmt: skip
    group.add_argument(
        "--prompt-tokens", type=positives, default=(128, 1024, 8192), metavar="LIST",
        help="prompts on an idle engine, each twice (default: 128,1024,8192)",
    )  # fmt: skip
    group.add_argument("--keep", type=Path, metavar="DIR", help="where traces are to stay")
    add_output(parser)
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    config = engine_config(args)
    _check_gpu(config)
    if args.keep is not None:
        _make(args.keep)
    from ...serving.progress import Terminal
    from .engine_run import TokenEngine

    reporter = Terminal()
    with TokenEngine(config, reporter) as engine:
        found, left_out = _profile(engine, args, reporter)
        results = {"settings": engine.described(), "scenarios": found, "left_out": left_out}
    finish(args, results, [_table(n, f) for n, f in found.items()], lambda f: _draw(f, results))


def _check_gpu(config: EngineConfig) -> None:
    """Before the minutes that an engine takes to start."""
    from ...serving.assemble import open_checkpoint, start_devices

    platform = start_devices(config, open_checkpoint(config)).platform
    if platform != "gpu":
        raise InvalidConfig(
            f"platform: got {platform}, must be gpu: kernels are read off the streams of GPUs"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidConfig(f"--keep: got {str(folder)!r}, must be a folder: {error}") from error


def _profile(
    engine: TokenEngine, args: argparse.Namespace, reporter: Reporter
) -> tuple[dict[str, Any], list[str]]:
    """What each scenario showed, by name; and those that this engine cannot run, and why."""
    import numpy as np

    from .trace import draw_prompts

    draw, found, left_out = np.random.default_rng(0), {}, []
    slots = engine.parts.sizes.spec.num_slots
    for name, prompts, outputs, part in _scenarios(args, engine, draw):
        longest = max(len(p) + n for p, n in zip(prompts, outputs, strict=True))
        if longest > engine.longest:
            left_out.append(f"{name}: the engine's limit is {engine.longest} tokens")
        elif name.startswith("decode") and len(prompts) > slots:
            left_out.append(f"{name}: the engine runs {slots} requests at once")
        else:
            with reporter.phase(name):
                if not name.startswith("hit"):  # a shape's first run is no one's
                    engine.run(draw_prompts([*map(len, prompts)], engine.vocab, draw), outputs)
                keep = args.keep and args.keep / name
                found[name] = _traced(engine, prompts, outputs, part, keep)
            continue
        reporter.note(f"left out: {left_out[-1]}")
    return found, left_out


def _scenarios(
    args: argparse.Namespace, engine: TokenEngine, draw: Any
) -> Iterable[tuple[str, list[tuple[int, ...]], list[int], float]]:
    """Name, prompts, output tokens, and from which share of the time on it counts."""
    from .trace import draw_prompts, read_trace

    vocab = engine.vocab
    for batch in args.batch:
        prompts = draw_prompts([64] * batch, vocab, draw)
        yield f"decode {batch}", prompts, [DECODE_TOKENS] * batch, 0.5
    for length in args.prompt_tokens:
        prompts = draw_prompts([length], vocab, draw)
        yield f"first {length}", prompts, [1], 0.0
        yield f"hit {length}", prompts, [1], 0.0
    trace = read_trace("sharegpt-like").first(MIXED_REQUESTS).fitted(engine.longest, clip=True)
    yield "mixed", draw_prompts(trace.prompts, vocab, draw), list(trace.outputs), 0.0


def _traced(
    engine: TokenEngine,
    prompts: list[tuple[int, ...]],
    outputs: list[int],
    part: float,
    keep: Path | None,
) -> dict[str, Any]:
    """The figures of one run."""
    import jax

    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = options.host_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            run = engine.run(prompts, outputs)
        finally:
            jax.profiler.stop_trace()
        steps = Counter(step.work.bucket for step in run.steps)
        file = max(folder.rglob("*.xplane.pb"), key=lambda f: f.stat().st_mtime)
        found = kernels(jax.profiler.ProfileData.from_file(str(file)))
    return {
        "wall_ms": 1e3 * run.seconds,
        "steps": {bucket_name(bucket): n for bucket, n in steps.items()},
        **summary(found, part, round(steps.total() * (1 - part)) or 1),
    }


def kernels(profile: Any) -> list[Interval]:
    """What ran on the streams of the first GPU that ran any, memory copies excluded."""
    gpus = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    for plane in sorted(gpus, key=lambda plane: plane.name):
        found = []
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                if not event.name.lower().startswith(("memcpy", "memset")):
                    begin = event.start_ns / 1e6
                    found.append((event.name, begin, begin + event.duration_ns / 1e6))
        if found:  # of several, each has as much to do; together they would hide who waits
            return sorted(found, key=lambda interval: interval[1])
    return []


def summary(found: list[Interval], part: float, steps: int) -> dict[str, Any]:
    """Busy share, kernels a step, and milliseconds a step by kind of kernel.

    Args:
      found: by their begin.
      part: what begins before this share of the whole time is left out.
      steps: that the rest stands for.
    """
    if not found:
        return {"busy": None, "launches": 0, "kernels": {}}
    first, last = found[0][1], max(end for _, _, end in found)
    found = [k for k in found if k[1] >= first + part * (last - first)]
    union, until = 0.0, found[0][1]
    by_kind: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for name, begin, end in found:
        union += max(0.0, end - max(begin, until))
        until = max(until, end)
        kind = by_kind[re.sub(r"[._]?\d+(?=[._]|$)", "", name)]
        kind[0] += (end - begin) / steps
        kind[1] += 1 / steps
    span = until - found[0][1]
    costly = sorted(by_kind.items(), key=lambda item: -item[1][0])
    return {
        "busy": union / span if span else 1.0,
        "ms_per_step": span / steps,
        "launches": len(found) / steps,
        "kernels": {name: {"ms": ms, "count": count} for name, (ms, count) in costly},
    }


def _table(name: str, found: dict[str, Any]) -> Any:
    busy = "nothing was traced" if found["busy"] is None else f"busy {found['busy']:.1%}"
    steps = ", ".join(f"{n} of {shape}" for shape, n in found["steps"].items())
    made = table(
        f"{name}: {found['wall_ms']:.1f} ms, {busy}, {found['launches']:.0f} kernels a step; "
        f"{steps}",
        "kernel", "ms a step", "a step",
    )  # fmt: skip
    for kernel, cost in list(found["kernels"].items())[:SHOWN]:
        made.add_row(kernel[:70], f"{cost['ms']:.3f}", f"{cost['count']:.1f}")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    """Each scenario's step, the kinds of kernels that cost most by name."""
    scenarios = results["scenarios"]
    total: defaultdict[str, float] = defaultdict(float)
    for found in scenarios.values():
        for kernel, cost in found["kernels"].items():
            total[kernel] += cost["ms"]
    shown = sorted(total, key=lambda kernel: -total[kernel])[:SHOWN]
    axes = figure.subplots()
    names = list(scenarios)
    left = [0.0] * len(names)
    for at, kernel in enumerate([*shown, ""]):
        costs = [
            sum(c["ms"] for k, c in f["kernels"].items() if (k if k in shown else "") == kernel)
            for f in scenarios.values()
        ]
        label, colour = (kernel[:40], f"C{at}") if kernel else ("others", "0.8")
        hatch = "//" if kernel and at >= 10 else None  # there are ten colours
        axes.barh(names, costs, left=left, label=label, color=colour, hatch=hatch)
        left = [begin + cost for begin, cost in zip(left, costs, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="ms of a step, by kind of kernel", title=results["settings"]["model"])
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
