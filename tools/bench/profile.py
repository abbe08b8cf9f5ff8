"""`quire bench profile`: where each millisecond of decode steps, prompts and mixtures goes.

Each scenario runs on one engine under JAX's profiler. Read off the streams of a GPU (the first, of
several) are the union of kernel intervals over the time from the first to the last of them (memory
copies do not count), and the time of each kind of kernel per step; in all, and for each step
program, whose name a kernel carries (model/programs.py). With --keep the traces stay, for tools
that draw them.

    decode N     the second half of N requests' 128 output tokens, all decoding by then; its step
                 programs are of all of them
    first N      a prompt of N tokens, one output token
    hit N        the same once more, from the prefix cache
    mixed N      the first N requests of the trace sharegpt-like at once, shortened where they must
                 be; all 1,000 are some 500,000 kernels, which are read in seconds
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidConfig
from ..flags import positives
from .models import add_engine, engine_config
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...config import EngineConfig
    from ...serving.progress import Reporter
    from .engine_run import TokenEngine

DECODE_TOKENS = 128
SHOWN = 12  # kinds of kernels in the table

_GROUPS = (
    ("products", re.compile("gemm|gemv|nvjet|cublas|cutlass|splitk", re.IGNORECASE)),
    ("prompts", re.compile("attention_(prefill|tile)")),
    ("answers", re.compile("attention")),
    ("others", re.compile("")),
)
"""Of kernels, in the table by step program: matrix products, attention of either."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--batch", type=_sizes, default=(1, 64, 256), metavar="LIST",
        help="requests decoding at once, or none (default: 1,64,256)",
    )  # fmt: skip
    group.add_argument(
        "--prompt-tokens", type=_sizes, default=(128, 1024, 8192), metavar="LIST",
        help="prompts on an idle engine, each twice, or none (default: 128,1024,8192)",
    )  # fmt: skip
    group.add_argument(
        "--mixed", type=_sizes, default=(120,), metavar="LIST",
        help="requests of the trace sharegpt-like at once, or none; it has 1,000 (default: 120)",
    )  # fmt: skip
    group.add_argument("--keep", type=Path, metavar="DIR", help="where traces are to stay")
    add_output(parser)
    add_engine(parser)


def _sizes(text: str) -> tuple[int, ...]:
    return () if text == "none" else positives(text)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    _check_mixed(args.mixed)
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
    tables = [make(n, f) for n, f in found.items() for make in (_table, _programs_table)]
    finish(args, results, tables, lambda figure: _draw(figure, results))


def _check_mixed(sizes: Sequence[int]) -> None:
    from .trace import read_trace

    most = len(read_trace("sharegpt-like"))
    if any(size > most for size in sizes):
        raise InvalidConfig(f"mixed: got {max(sizes)}, must be at most {most}")


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
    whole = read_trace("sharegpt-like").fitted(engine.longest, clip=True)
    for count in args.mixed:
        trace = whole.first(count)
        yield f"mixed {count}", draw_prompts(trace.prompts, vocab, draw), [*trace.outputs], 0.0


def _traced(
    engine: TokenEngine,
    prompts: list[tuple[int, ...]],
    outputs: list[int],
    part: float,
    keep: Path | None,
) -> dict[str, Any]:
    """The figures of one run."""
    import jax

    from .kernel_trace import kernels, programs, summary
    from .step_clock import bucket_name, by_bucket

    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = options.host_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            run = engine.run(prompts, outputs)
        finally:
            jax.profiler.stop_trace()
        file = max(folder.rglob("*.xplane.pb"), key=lambda f: f.stat().st_mtime)
        found = kernels(jax.profiler.ProfileData.from_file(str(file)))
    steps = by_bucket(run.steps)
    return {
        "wall_ms": 1e3 * run.seconds,
        "steps": {bucket_name(bucket): seen["count"] for bucket, seen in steps.items()},
        **summary(found, part, round(len(run.steps) * (1 - part)) or 1),
        "programs": programs(found, steps),
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


def _programs_table(name: str, found: dict[str, Any]) -> Any:
    groups = [group for group, _ in _GROUPS]
    made = table(f"{name}, by program: ms", "", "steps", "a step", "kernels", *groups)
    for program, seen in found["programs"].items():
        cost = dict.fromkeys(groups, 0.0)
        for kernel, kind in seen["kernels"].items():
            cost[next(group for group, pattern in _GROUPS if pattern.search(kernel))] += kind["ms"]
        counted = seen["steps"] is not None
        counts = (f"{seen['steps']:,}", f"{seen['step_ms']:.3f}") if counted else ("", "")
        made.add_row(program, *counts, *(f"{v:.3f}" for v in (seen["kernels_ms"], *cost.values())))
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
