"""What the engine counts, and the snapshot of it that others read.

The scheduler owns one `Counters`; `EngineStats` is what /metrics and benchmarks see.
"""

from __future__ import annotations

from dataclasses import dataclass


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
      running: requests with a slot.
      waiting: requests without one.
      steps: steps planned.
      prompt_tokens: prompt tokens of admitted requests.
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
      recomputed_tokens: tokens computed again because of preemption.
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
