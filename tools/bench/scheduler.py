"""`quire bench scheduler`: host time of a step, without a device.

A step is what the engine's thread does between two launches: take in new requests, `schedule`
(prefixes are looked up), `pack` into the transfer buffer, `update` with the results. The trace runs
in a closed loop: at first as many requests as there are rows, then a new one for each that ends.
Steps at nine tenths of the rows or more are the figure; the filling is reported beside it.

Wall time has in it whatever else the machine does. The thread's CPU time has less of that, but a
neighbour still empties caches; so the same steps are replayed a few times, and the least that each
took ("replayed") says what the code costs. Garbage collections in measured steps are counted, with
the longest pause.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...serving.collector import quiet_collector
from ..flags import from_zero, positive, positives
from .report import add_output, check_output, finish, over_sizes, table
from .trace import Trace, add_trace, read_trace

if TYPE_CHECKING:
    from ...model.plan import RunnerSpec
    from ...sched.request import Request

BUDGETS_MS = {256: 1.0, 1000: 3.0}
"""p99 of a step, by rows (docs/design.md, section 10)."""

STEP_SECONDS = 0.02
"""What the scheduler's clock is told a step takes: about what a device needs for so many rows. Work
that goes by the clock (looking at how full the pages are) then comes as often as it would."""

FULL = 0.9
"""Share of the rows from which on a step counts as full."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--rows",
        type=positives,
        default=(256, 1000),
        metavar="LIST",
        help="requests running at once (default: 256,1000)",
    )
    add_trace(group)
    group.add_argument(
        "--steps", type=positive, default=1000, metavar="N", help="full steps (default: 1000)"
    )
    group.add_argument(
        "--replays", type=positive, default=5, metavar="N", help="of the same steps (default: 5)"
    )
    group.add_argument("--page-size", type=positive, default=16, metavar="N", help="(default: 16)")
    group.add_argument(
        "--collector",
        choices=("serve", "default"),
        default="serve",
        help="Python's garbage collector as quire serve sets it, or as Python does",
    )
    group.add_argument("--seed", type=from_zero, default=0, help="of the token ids (default: 0)")
    group.add_argument(
        "--profile", action="store_true", help="also say where the time goes (steps get slower)"
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    from ...serving.progress import Terminal

    trace = read_trace(args.trace)
    if args.collector == "serve":
        quiet_collector()
    reporter = Terminal()
    results: dict[str, Any] = {
        "trace": trace.name,
        "page_size": args.page_size,
        "collector": args.collector,
        "rows": {},
    }
    for rows in args.rows:
        spec = _spec(rows, args.page_size, trace)
        with reporter.phase(f"{rows} rows") as update:
            loop = ClosedLoop(spec, trace, args.seed)
            profile = _Profile(args.profile)
            with profile:
                loop.run(args.steps, update)
            costs = [loop.steps.cpu]
            for _ in range(args.replays - 1):
                again = ClosedLoop(spec, trace, args.seed)
                again.run(args.steps, update)
                costs.append(again.steps.cpu)
        results["rows"][str(rows)] = found = loop.figures(BUDGETS_MS.get(rows))
        found["full"]["replayed_cpu_ms"] = percentiles(
            [min(each) for each in zip(*costs, strict=True)]
        )
        if args.profile:
            reporter.note(profile.said())
    tables = [_table(results)]
    finish(args, results, tables, lambda figure: _draw(figure, results), on_device=False)


def _spec(rows: int, page_size: int, trace: Trace) -> RunnerSpec:
    """Pages for every row at the trace's mean length, half as much again: none gives way."""
    from .null_runner import null_spec

    longest = max(p + o for p, o in zip(trace.prompts, trace.outputs, strict=True))
    mean = (sum(trace.prompts) + sum(trace.outputs)) / len(trace)
    pages = 1 + max(int(1.5 * rows * mean) // page_size, -(-longest // page_size))
    return null_spec(rows, page_size=page_size, max_model_len=longest, pages=pages)


@dataclass(slots=True)
class _Steps:
    """Nanoseconds of each step, and of its parts."""

    wall: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)
    parts: dict[str, list[int]] = field(
        default_factory=lambda: {"admit": [], "schedule": [], "pack": [], "update": []}
    )

    def milliseconds(self) -> dict[str, Any]:
        return {
            "steps": len(self.wall),
            "wall_ms": percentiles(self.wall),
            "cpu_ms": percentiles(self.cpu),
            "parts_wall_ms": {name: percentiles(values) for name, values in self.parts.items()},
        }


def percentiles(nanoseconds: list[int]) -> dict[str, float]:
    """Milliseconds."""
    import numpy as np

    if not nanoseconds:
        return {}
    p50, p99 = np.percentile(nanoseconds, [50, 99])
    return {"p50": p50 / 1e6, "p99": p99 / 1e6, "max": max(nanoseconds) / 1e6}


class _Collections:
    """Counts garbage collections and their longest pause while it is on."""

    def __init__(self) -> None:
        self.counts, self.longest_ns, self._begin = [0, 0, 0], 0, 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._begin = time.perf_counter_ns()
            return
        self.counts[info["generation"]] += 1
        self.longest_ns = max(self.longest_ns, time.perf_counter_ns() - self._begin)


class ClosedLoop:
    """A scheduler that is kept busy with a trace.

    Args:
      spec: the engine's sizes.
      trace: lengths of the requests, again and again.
      seed: of their token ids.
    """

    def __init__(self, spec: RunnerSpec, trace: Trace, seed: int = 0):
        import numpy as np

        from ...model.inputs import InputLayout
        from ...sched.scheduler import Scheduler
        from .null_runner import NullRunner

        self._now = 0.0
        self.scheduler = Scheduler(
            spec,
            max_batched_tokens=spec.ladder.max_tokens,
            prefill_chunk=spec.ladder.max_tokens,
            max_queue=2**31,
            clock=lambda: self._now,
        )
        self.steps, self.filling = _Steps(), _Steps()
        self._spec, self._trace = spec, trace
        self._runner = NullRunner(spec)
        self._draw = np.random.default_rng(seed)
        self._layouts = {
            bucket: InputLayout(bucket, spec.page_size, spec.num_slots, spec.max_pages_per_seq)
            for bucket in spec.ladder.buckets
        }
        self._made = 0
        self._collections = _Collections()
        self._flight: Any = None  # the plan whose results come next
        self._arriving = [self._request() for _ in range(spec.num_slots)]

    def run(self, full_steps: int, progress: Any = None) -> None:
        """Until so many steps were full. One step is always in flight, as in the engine."""
        gc.callbacks.append(self._collections)
        try:
            while len(self.steps.wall) < full_steps:
                outputs = self._step()
                self._arriving = [self._request() for o in outputs if o.finish_reason is not None]
                if progress is not None:
                    progress(len(self.steps.wall), full_steps)
        finally:
            gc.callbacks.remove(self._collections)

    def _step(self) -> list[Any]:
        """One round as in Engine.step; returns the outputs."""
        from ...model.inputs import pack

        scheduler, clock = self.scheduler, time.perf_counter_ns
        self._now += STEP_SECONDS
        # What the device would have done meanwhile is no part of the host's time.
        flight = self._flight
        results = None if flight is None else self._runner.collect(flight)
        cpu, begin = time.thread_time_ns(), clock()
        for request in self._arriving:
            scheduler.add(request)
        admitted = clock()
        plan = scheduler.schedule()
        scheduled = clock()
        if plan is not None:
            pack(plan, self._layouts[plan.bucket])
        packed = clock()
        outputs = [] if results is None else scheduler.update(flight, results)
        updated, cpu_end = clock(), time.thread_time_ns()

        is_full = plan is not None and plan.num_rows >= FULL * self._spec.num_slots
        steps = self.steps if is_full else self.filling
        steps.wall.append(updated - begin)
        steps.cpu.append(cpu_end - cpu)
        parts = (admitted - begin, scheduled - admitted, packed - scheduled, updated - packed)
        for part, value in zip(steps.parts.values(), parts, strict=True):
            part.append(value)
        self._flight = plan
        return outputs

    def _request(self) -> Request:
        from ...sched.request import Request, SamplingParams

        at = self._made % len(self._trace)
        self._made += 1
        tokens = self._draw.integers(0, self._spec.vocab_size, self._trace.prompts[at])
        sampling = SamplingParams(
            temperature=0.0, max_tokens=self._trace.outputs[at], ignore_eos=True, seed=0
        )
        return Request(id=str(self._made), prompt=tuple(tokens.tolist()), sampling=sampling)

    def figures(self, budget_ms: float | None) -> dict[str, Any]:
        stats = self.scheduler.stats()
        return {
            "full": self.steps.milliseconds(),
            "filling": self.filling.milliseconds(),
            "budget_p99_ms": budget_ms,
            "requests": self._made,
            "collections_by_generation": self._collections.counts,
            "longest_collection_ms": self._collections.longest_ns / 1e6,
            "page_waste": stats.waste,
            "preemptions": stats.preemptions,
            "prefix_queried_tokens": stats.prefix_queried_tokens,
        }


class _Profile:
    """cProfile over a stretch, when asked for."""

    def __init__(self, wanted: bool):
        import cProfile

        self._profile = cProfile.Profile() if wanted else None

    def __enter__(self) -> None:
        if self._profile is not None:
            self._profile.enable()

    def __exit__(self, *_: object) -> None:
        if self._profile is not None:
            self._profile.disable()

    def said(self) -> str:
        import io
        import pstats

        text = io.StringIO()
        if self._profile is not None:
            pstats.Stats(self._profile, stream=text).sort_stats("tottime").print_stats(20)
        return text.getvalue()


def _table(results: dict[str, Any]) -> Any:
    title = f"scheduler: {results['trace']}, collector as {results['collector']}; ms per step"
    made = table(
        title, "rows", "steps", "p50", "p99", "max", "CPU p50", "CPU p99",
        "replayed p50", "replayed p99", "budget p99",
    )  # fmt: skip
    for rows, found in results["rows"].items():
        budget = found["budget_p99_ms"]
        for kind in ("full", "filling"):
            figures = found[kind]
            if not figures["steps"]:
                continue
            wall, cpu = figures["wall_ms"], figures["cpu_ms"]
            cells = [wall["p50"], wall["p99"], wall["max"], cpu["p50"], cpu["p99"]]
            replayed = figures.get("replayed_cpu_ms", {})
            least = [f"{replayed[name]:.3f}" for name in ("p50", "p99") if replayed] or ["", ""]
            limit = f"{budget:.1f}" if budget and kind == "full" else ""
            name = rows if kind == "full" else f"{rows}, filling"
            made.add_row(name, str(figures["steps"]), *(f"{c:.3f}" for c in cells), *least, limit)
        for part, wall in found["full"]["parts_wall_ms"].items():
            cells = [wall["p50"], wall["p99"], wall["max"]]
            made.add_row(f"  {part}", "", *(f"{c:.3f}" for c in cells))
        pauses = ", ".join(map(str, found["collections_by_generation"]))
        longest = found["longest_collection_ms"]
        made.add_row(f"  collections: {pauses} by generation", "", "", "", f"{longest:.3f}")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    axes = figure.subplots()
    rows = results["rows"]
    sizes = [int(size) for size in rows]
    for name in ("p50", "p99"):
        values = [found["full"]["wall_ms"][name] for found in rows.values()]
        axes.plot(sizes, values, marker="o", label=f"{name}, wall")
        values = [found["full"]["cpu_ms"][name] for found in rows.values()]
        axes.plot(sizes, values, marker="x", ls="--", label=f"{name}, CPU")
    budgets = {int(r): f["budget_p99_ms"] for r, f in rows.items() if f["budget_p99_ms"]}
    axes.plot(list(budgets), list(budgets.values()), "_", ms=20, label="budget of p99")
    over_sizes(axes, sizes, x="rows", y="ms of host time per step")
    axes.legend()
