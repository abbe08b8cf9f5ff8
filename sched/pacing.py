"""When the next step is planned, while the device runs one. Used by the engine's loop.

The device must have its next step before it is done with this one, or it stands still; but who
comes once that is planned waits for the one after. So the plan is made late: as long before the
running step should end as planning takes, and a part of it in reserve. How long steps of a bucket
take is what they took lately, the shorter the sooner believed; how long planning takes is learned
from its being late. Where nobody came lately, as in a batch, there is nobody to wait for.

By a model of an H200's steps (tools/bench/replay.py), Llama-3.1-8B's time to first token at 25 and
50 requests a second is 4 to 6 ms shorter for it, and nothing else changes. Steps that are short, or
have few rows, are not waited in.
"""

from __future__ import annotations

from ..model.plan import Bucket

RESERVE = 1 / 4
"""Of a step's usual time: steps of a bucket differ by what they read of the cache."""

LATE = 0.5e-3
"""Seconds that at least should be left of a step when the next has been launched."""

LEAST_LEAD, MOST_LEAD = 1e-3, 20e-3
"""Seconds before a step's end at which the next is planned."""

SHORTEST = 4e-3
"""Seconds below which a step is over too soon to plan within it, and an arrival waits little."""

FEW = 4
"""Rows of a step below which it is not waited in: it may be the last that there is to do, and its
answer is wanted as soon as it is there. (A lone request's first token on an H200 came 0.5 to 1 ms
later.)"""

LONGEST = 0.1
"""Seconds that a step is taken to last at most: one that hung says nothing about the next."""

RECENT = 1.0
"""Seconds after an arrival within which another is expected."""

_LATE_SHARE = 1 / 8
_SLOWER, _FASTER = 1.05, 1.5
_FORGET = 0.99


class Pacing:
    """Of one engine. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._usual: dict[Bucket, float] = {}
        self._lead = LEAST_LEAD
        self._came = float("-inf")

    def came(self, now: float) -> None:
        """Somebody came."""
        self._came = now

    def took(self, bucket: Bucket, seconds: float, left: float) -> None:
        """A step has run.

        Args:
          seconds: that it took.
          left: of these, once the next had been launched.
        """
        usual = self._usual.get(bucket, LONGEST)
        self._usual[bucket] = min(seconds, usual * _SLOWER, LONGEST)
        if seconds < SHORTEST:
            return  # planned at once, and late by nature
        # Reading results that were there long ago takes a moment, too, which is not left of a step.
        if left < max(LATE, seconds * _LATE_SHARE):
            self._lead = min(self._lead * _FASTER, MOST_LEAD)
        else:
            self._lead = max(self._lead * _FORGET, LEAST_LEAD)

    def wait(self, bucket: Bucket, rows: int, begun: float, now: float) -> float:
        """Seconds from now at which the next step should be planned; 0 or less: now.

        Args:
          bucket, rows: of the step that runs.
          begun: when the device could begin with it.
        """
        usual = self._usual.get(bucket, 0.0)
        if now - self._came > RECENT or rows < FEW or usual < SHORTEST:
            return 0.0
        return begun + min((1 - RESERVE) * usual, usual - self._lead) - now
