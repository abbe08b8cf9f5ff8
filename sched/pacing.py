"""When the next step is planned, while the device runs one. Used by the engine's loop.

The device must have its next step before it is done with this one, or it stands still; but who
comes once that is planned waits for the one after. So the plan is made late: as long before the
running step should end as planning and launching take, and something in reserve. How long steps of
a bucket take is what they took lately, the shorter the sooner believed; how long the host takes is
measured, too, and nearly all steps of late took less. Of a step that was over before the next was
launched nobody saw how long it took: it is taken to be a good deal shorter than it seemed. Where
nobody came lately, as in a batch, there is nobody to wait for.

By a model of an H200's steps (tools/bench/replay.py), Llama-3.1-8B's time to first token at 25 and
50 requests a second is 3 to 5 ms shorter for it, and the device stands still for less than 1 % of
the time. Steps that are short, or have few rows, are not waited in.
"""

from __future__ import annotations

from ..model.plan import Bucket

RESERVE = 1 / 20
"""Of a step's usual time: steps of a bucket differ by what they read of the cache."""

MARGIN = 0.3e-3
"""Seconds that should be left of a step when the next has been launched."""

LEAST_LEAD, MOST_LEAD = 0.1e-3, 20e-3
"""Seconds that the host is taken to need, at least and at most."""

IN_TIME = 0.95
"""Of the steps, those for which the host should need less than it is taken to."""

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

LATE = 0.15e-3
"""Seconds in which results are read that were there already."""

_SLOWER = 1.03
_UNSEEN = 0.8
_GAIN = 1 / 10
_FIRST_LEAD = 1e-3


class Pacing:
    """Of one engine. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._usual: dict[Bucket, float] = {}
        self._lead = _FIRST_LEAD
        self._came = float("-inf")
        self._waits = False  # in the step that runs

    def came(self, now: float) -> None:
        """Somebody came."""
        self._came = now

    def planned(self, seconds: float) -> None:
        """The host took so long to plan a step and launch it.

        The estimate goes up by `IN_TIME` for one that took longer and down by the rest for one that
        took less, so that it comes to stand where that is the share of each (Robbins and Monro, "A
        stochastic approximation method", 1951).
        """
        share = IN_TIME if seconds > self._lead else IN_TIME - 1
        self._lead = min(max(self._lead * (1 + _GAIN * share), LEAST_LEAD), MOST_LEAD)

    def took(self, bucket: Bucket, seconds: float, left: float) -> None:
        """A step has run.

        Args:
          seconds: from when the device could begin with it until its results were read.
          left: of these, once the next had been launched.
        """
        usual = self._usual.get(bucket, LONGEST)
        if left >= LATE:
            self._usual[bucket] = min(seconds, usual * _SLOWER, LONGEST)
        else:  # it was over at some time before
            self._usual[bucket] = min(seconds, usual) * (_UNSEEN if self._waits else 1.0)
        self._waits = False

    def wait(self, bucket: Bucket, rows: int, begun: float, now: float) -> float:
        """Seconds from now at which the next step should be planned; 0 or less: now.

        Args:
          bucket, rows: of the step that runs.
          begun: when the device could begin with it.
        """
        usual = self._usual.get(bucket, 0.0)
        if now - self._came > RECENT or rows < FEW or usual < SHORTEST:
            return 0.0
        seconds = begun + (1 - RESERVE) * usual - self._lead - MARGIN - now
        self._waits = seconds > 0
        return seconds
