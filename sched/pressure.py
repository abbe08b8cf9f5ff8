"""Pages and slots taken from those who run, for others who need them more.

Used by the planner, which says who needs what; policy.py says who gives way. Owns what has to be
remembered from one step to the next: a row with an unread result is collected before its sequence
loses its pages, so who is to give way rests for a step, and goes in the one after.

    grow ──pages run short──────────> policy.gives_way ──┐
    make_place ──a newcomer waits──> policy.gives_place ─┴─> rests while in flight ──> preempt
"""

from __future__ import annotations

from ..kv.cache import KVCache
from . import policy
from .roster import Roster
from .sequence import Sequence
from .stats import Meters


class Pressure:
    """Of one scheduler.

    Attributes:
      resting: sits out this step, so as to give way in the next.
      is_short: the first in the queue found no pages when the last step was planned.
    """

    def __init__(self, roster: Roster, cache: KVCache, meters: Meters):
        self._roster = roster
        self._cache = cache
        self._meters = meters
        self.resting: Sequence | None = None
        self.is_short = False
        self._asked: Sequence | None = None  # shall rest in the next step, because it is in this

    def make_place(self) -> None:
        """A step begins. A tenant that runs less than its share does not wait for others' long
        answers to end."""
        asked, self._asked = self._asked, None
        roster = self._roster
        running, queue = roster.running, roster.waiting
        # One that a fault kept from ending in order has its slot still, and runs no more.
        is_valid = asked is not None and asked.slot >= 0 and not asked.ended
        self.resting = asked if is_valid and asked is not running.first else None
        if not queue.contended or not queue or (roster.slot_free and not self.is_short):
            return
        if self._meters.recompute.ratio > policy.MAX_FAIR_RECOMPUTE_RATIO:
            return
        victim = policy.gives_place(running, queue)
        if victim is not None:
            self._give_way(self.resting or victim)

    def grow(self, seq: Sequence, positions: int, *, may_take: bool = True) -> list[int] | None:
        """Pages for `positions` of a sequence, taken from another if need be; those added.

        None: it sits this step out. Either it is the one to give way itself, and keeps what it has
        until somebody needs it; or results of that one are on their way, and are read before it
        gives way: it rests, so that none will be on their way.
        """
        roster = self._roster
        while (added := self._cache.grow(seq.kv, positions)) is None:
            if not may_take:
                return None
            victim = self.resting or policy.gives_way(roster.running, roster.waiting)
            if victim is seq or not self._give_way(victim):
                return None
        return added

    def preempt(self, seq: Sequence) -> None:
        """Takes pages and slot; what was computed is computed again, or found in the index."""
        self._meters.counters.preemptions += 1
        seq.group.preemptions += 1
        seq.recompute_until = max(seq.recompute_until, seq.scheduled)
        self._roster.suspend(seq)

    def _give_way(self, victim: Sequence) -> bool:
        """Preempts a sequence, or has it rest if it is in flight; whether it is gone."""
        if victim.in_flight:
            self.resting = victim
            if self._roster.waiting.contended:  # it may be part of this step already
                self._asked = victim
            return False
        self.resting = None
        self.preempt(victim)
        return True
