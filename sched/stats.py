"""What the engine counts, and the snapshot of it that others read.

The scheduler owns one `Meters`, the engine one `StepTimes`; `EngineStats` is what /metrics and
benchmarks see.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass

from ..kv.accounting import PrefixCounters, RecomputeMeter, WasteMeter
from ..kv.cache import KVCache
from ..model.plan import StepPlan
from .roster import Roster


@dataclass(slots=True)
class Counters:
    """Running totals since start."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One moment of the engine; totals are since start.

    Attributes:
      running: answers in the making, each with a slot; most requests have one.
      waiting: requests, and answers that had to give way, without a slot.
      steps: steps planned.
      prompt_tokens: prompt tokens of admitted requests, whatever the number of their answers.
      output_tokens: tokens handed to callers.
      finished: requests that ended, for any reason.
      preemptions: times a request gave way for want of pages.
      failed_steps: times the device state was lost.
      prefix_queried_tokens: prompt tokens looked up in the prefix index.
      prefix_hit_tokens: those found there.
      pages_total: pages that can be handed out.
      pages_used: pages held by running requests.
      pages_cached: pages nobody holds that the prefix index still finds.
      waste: 1 - used / allocated token slots over held pages, weighted by time.
      real_tokens: tokens in steps.
      padded_tokens: tokens of the step programs that ran them.
      useful_tokens: tokens computed for the first time.
      recomputed_tokens: tokens computed again because of preemption or of a failed device step.
      recompute_ratio: recomputed per useful token, lately.
    """

    running: int
    waiting: int
    steps: int
    prompt_tokens: int
    output_tokens: int
    finished: int
    preemptions: int
    failed_steps: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    pages_total: int
    pages_used: int
    pages_cached: int
    waste: float
    real_tokens: int
    padded_tokens: int
    useful_tokens: int
    recomputed_tokens: int
    recompute_ratio: float

    @property
    def padding_waste(self) -> float:
        """Share of the tokens that the device computed which were padding."""
        return 1 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0


STEP_BOUNDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""Seconds; the upper ends of the buckets that step times are counted in."""


class StepTimes:
    """How long steps took, by kind. Written by the engine's thread, safe to read from any.

    Attributes:
      counts: kind -> how many fell into each bucket of STEP_BOUNDS, and beyond the last.
      seconds: kind -> their sum.
    """

    def __init__(self) -> None:
        self.counts = {
            kind: [0] * (len(STEP_BOUNDS) + 1) for kind in ("decode", "mixed", "prefill")
        }
        self.seconds = dict.fromkeys(self.counts, 0.0)

    def count(self, plan: StepPlan, seconds: float) -> None:
        """A step's results were read, so long after the device could begin with it."""
        if plan.num_decode == plan.num_rows:
            kind = "decode"
        else:
            kind = "mixed" if plan.num_decode else "prefill"
        self.counts[kind][bisect_left(STEP_BOUNDS, seconds)] += 1
        self.seconds[kind] += seconds


class Meters:
    """All counts of one scheduler."""

    def __init__(self, clock: Callable[[], float]):
        self.counters = Counters()
        self.recompute = RecomputeMeter()
        self.waste = WasteMeter(clock)
        self._prefix = PrefixCounters()

    def enter(self, prompt: int, found: int) -> None:
        """A request was admitted, with so many of its prompt's tokens found in the index."""
        self._prefix.count(prompt, found)
        self.counters.prompt_tokens += prompt

    def depart(self, plan: StepPlan) -> None:
        """A step is about to be launched."""
        self.counters.steps += 1
        self.counters.real_tokens += plan.num_tokens
        self.counters.padded_tokens += plan.bucket.tokens

    def look_at_pages(self, roster: Roster, cache: KVCache) -> None:
        """How full the pages are, when it is time for a look, or when the last were given back.

        Full pages may be held by many; what is empty belongs to one alone.
        """
        if self.waste.due or not roster.running:
            empty = sum([seq.kv.capacity - seq.scheduled for seq in roster.running])
            allocated = cache.owned * cache.page_size
            self.waste.observe(allocated - empty, allocated)

    def stats(self, roster: Roster, cache: KVCache) -> EngineStats:
        recompute = self.recompute
        return EngineStats(
            running=len(roster.running),
            waiting=len(roster.waiting),
            finished=roster.finished,
            **asdict(self.counters),
            prefix_queried_tokens=self._prefix.queried_tokens,
            prefix_hit_tokens=self._prefix.hit_tokens,
            pages_total=cache.total,
            pages_used=cache.owned,
            pages_cached=cache.cached,
            waste=self.waste.waste,
            useful_tokens=recompute.useful,
            recomputed_tokens=recompute.recomputed,
            recompute_ratio=recompute.ratio,
        )
