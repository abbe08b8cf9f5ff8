"""How long each step of an engine took, and what it had to do. Used by engine_run.py; step_costs.py
says what the same work takes on an H200.

A step takes from when the device could begin with it (it was launched, and the one before
collected) until its own results were collected, so that the steps of a busy engine add up to the
wall clock.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

from ...model.plan import Bucket, Runner, StepHandle, StepOutputs, StepPlan


class Work(NamedTuple):
    """What a step has to do.

    Attributes:
      tokens, rows: without padding.
      decode_rows: rows that go on from their last token.
      decode_reads: KV tokens that these read, in all.
      prompt_reads: KV tokens that prompt chunks read, each chunk's once.
      prompt_pairs: pairs of a prompt token and one that it sees.
    """

    bucket: Bucket
    tokens: int
    rows: int
    decode_rows: int
    decode_reads: int
    prompt_reads: int
    prompt_pairs: int

    @classmethod
    def of(cls, plan: StepPlan) -> Work:
        decodes = plan.num_decode
        ends = plan.starts + plan.counts
        counts = plan.counts[decodes:].astype("int64")
        return cls(
            plan.bucket,
            plan.num_tokens,
            plan.num_rows,
            decodes,
            int(ends[:decodes].sum()),
            int(ends[decodes:].sum()),
            int((counts * (2 * ends[decodes:] - counts + 1)).sum()) // 2,
        )


class Step(NamedTuple):
    """A step that ran."""

    work: Work
    seconds: float


CALLS_KEPT = 4096
"""Calls of the runner whose times are kept."""


class StepClock:
    """Stands around a runner's calls: in the way of nobody else, where a wrapper class would have
    to follow the runner's faces.

    Attributes:
      calls: the last of them: "launch" or "collect", and when each began and ended, by `now`.
      steps: gets each step that is collected from now on; None: nobody wants to know. Set and read
        it while the engine is idle.
    """

    def __init__(self, runner: Runner, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self.steps: list[Step] | None = None
        self.calls: deque[tuple[str, float, float]] = deque(maxlen=CALLS_KEPT)
        self._flights: deque[tuple[StepHandle, Work, float]] = deque()
        self._collected = 0.0
        self._launch, self._collect = runner.launch, runner.collect
        setattr(runner, "launch", self._launched)  # noqa: B010
        setattr(runner, "collect", self._read)  # noqa: B010

    def _launched(self, plan: StepPlan) -> StepHandle:
        begin = self._now()
        handle = self._launch(plan)
        launched = self._now()
        self.calls.append(("launch", begin, launched))
        if self.steps is not None:
            self._flights.append((handle, Work.of(plan), launched))
        return handle

    def _read(self, handle: StepHandle) -> StepOutputs:
        begin = self._now()
        outputs = self._collect(handle)
        now = self._now()
        self.calls.append(("collect", begin, now))
        while self._flights:  # those that a fault took with it are never collected
            flight, work, launched = self._flights.popleft()
            if flight is handle:
                if self.steps is not None:
                    took = now - max(launched, self._collected)
                    self.steps.append(Step(work, took))
                break
        self._collected = now
        return outputs


def by_bucket(steps: Iterable[Step]) -> dict[Bucket, dict[str, Any]]:
    """How many steps of each step program there were, and their milliseconds: median and sum."""
    found: defaultdict[Bucket, list[float]] = defaultdict(list)
    for step in steps:
        found[step.work.bucket].append(1e3 * step.seconds)
    return {
        bucket: {"count": len(ms), "median_ms": median(ms), "sum_ms": sum(ms)}
        for bucket, ms in sorted(found.items())
    }


def bucket_name(bucket: Bucket) -> str:
    """ "2048 tokens x 256 rows, greedy"."""
    k = f", k={bucket.k}" if bucket.k > 1 else ""
    return f"{bucket.tokens} tokens x {bucket.rows} rows, {bucket.sampler.name.lower()}{k}"
