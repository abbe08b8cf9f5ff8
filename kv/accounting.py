"""What KV memory and recomputation cost, as numbers that can be exported.

Fed by the scheduler once per step; read by whoever asks for statistics, from any thread: every
figure is made of plain numbers that are replaced, never of containers that are walked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RECOMPUTE_WINDOW = 1 << 18
"""Computed tokens of the recompute ratio; older ones count half, then a quarter."""

WASTE_PERIOD = 0.1
"""Seconds between looks at how full the pages are."""


class WasteMeter:
    """Share of the allocated token slots that hold no token, weighted by time.

    waste = 1 - used / allocated, over the pages that running requests hold.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._since = clock()
        self._used = 0
        self._allocated = 0
        self._used_seconds = 0.0
        self._allocated_seconds = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time for another look, which costs time for each running request."""
        return not self._allocated or self._clock() - self._since >= WASTE_PERIOD

    def observe(self, used: int, allocated: int) -> None:
        """From now on, `used` of `allocated` token slots hold a token."""
        now = self._clock()
        passed = now - self._since
        self._used_seconds += self._used * passed
        self._allocated_seconds += self._allocated * passed
        self._since, self._used, self._allocated = now, used, allocated

    @property
    def waste(self) -> float:
        passed = self._clock() - self._since
        allocated = self._allocated_seconds + self._allocated * passed
        used = self._used_seconds + self._used * passed
        return 1 - used / allocated if allocated else 0.0


@dataclass(slots=True)
class PrefixCounters:
    """How much of the prompts came from the prefix index. A preempted request counts once."""

    queried_tokens: int = 0
    hit_tokens: int = 0

    def count(self, queried: int, hit: int) -> None:
        self.queried_tokens += queried
        self.hit_tokens += hit


class RecomputeMeter:
    """Tokens computed for the first time, and tokens computed again because of preemption or of
    a failed device step.

    `ratio` looks at the recent past, so that a long calm does not hide a thrashing engine.
    """

    def __init__(self) -> None:
        self.useful = 0
        self.recomputed = 0
        self._recent_useful = 0.0
        self._recent_recomputed = 0.0

    def count(self, useful: int, recomputed: int) -> None:
        self.useful += useful
        self.recomputed += recomputed
        self._recent_useful += useful
        self._recent_recomputed += recomputed
        if self._recent_useful + self._recent_recomputed > RECOMPUTE_WINDOW:
            self._recent_useful /= 2
            self._recent_recomputed /= 2

    @property
    def ratio(self) -> float:
        return self._recent_recomputed / max(self._recent_useful, 1.0)
