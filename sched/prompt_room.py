"""How many tokens of a step are left for prompts, and whose.

Used by the planner, once a step. A step takes the longer the more prompt tokens it has, for all
rows in it. So while a tenant is served, those that have had more than it (fairness.py) get a part
of the step for their prompts, not all that decode rows leave: long prompts of one that floods would
else make every step as long as it can be, and leave no room for a newcomer's prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain
from math import ceil
from operator import itemgetter

from .fairness import OUTPUT_COST
from .roster import Roster
from .sequence import Sequence
from .tenant import Tenant

LEAST_PART = 1 / 4
"""Of a step; what the prompts of two tenants that weigh the same get however few slots
there are."""


class PromptRoom:
    """Of one step.

    Args:
      max_tokens: of a step.
      num_slots: of the device.
      decoding: tokens of this step that are not of prompts.
      roster: who runs, and who is next.
    """

    def __init__(self, max_tokens: int, num_slots: int, decoding: int, roster: Roster):
        self._max_tokens = max_tokens
        # A step of so many tokens takes about twice as long as one in which all slots decode.
        self._doubled = max(OUTPUT_COST * num_slots, LEAST_PART * max_tokens)
        self._decoding = self._filled = decoding
        self._taken: dict[Tenant, tuple[float, int]] = {}  # virtual time before, tokens
        self._roster = roster
        self._priorities: list[int] = []
        self._least: list[Tenant] = []  # who has had least of all that have these or better ones

    def of(self, seq: Sequence) -> int:
        """Tokens left for its prompt."""
        left, queue = self._max_tokens - self._filled, self._roster.waiting
        least = self._least_served(seq) if queue.contended else None
        if least is not None and seq.group.tenant.time > least.time:
            # A step as long as a decode step would take on the other's share of the device alone.
            share = least.weight / queue.active_weight
            # Of what decode rows leave, the other's share stays, should its prompt come.
            rest = ceil((1 - share) * (self._max_tokens - self._decoding))
            part = min(int(self._doubled / 2 / share), self._decoding + rest)
            spare = part - self._filled
            if spare < len(seq.tokens):  # else it needs no more
                spare += self._beyond(seq.group.tenant)
            left = min(left, spare)
        return max(0, left)

    def take(self, seq: Sequence, tokens: int) -> None:
        """So many of them are in the step; its tenant is charged after this."""
        self._filled += tokens
        tenant = seq.group.tenant
        time, before = self._taken.get(tenant, (tenant.time, 0))
        self._taken[tenant] = time, before + tokens

    def _beyond(self, tenant: Tenant) -> int:
        """Tokens of this step for those who have had more than this one: they leave it its part."""
        time = self._taken[tenant][0] if tenant in self._taken else tenant.time
        return sum(tokens for other, tokens in self._taken.values() if other > time)

    def _least_served(self, seq: Sequence) -> Tenant | None:
        """Of the tenants that are served with its priority or a better one, who has had least; None
        if that is its own, or nobody."""
        if not self._priorities:
            self._look()
        at = bisect_right(self._priorities, seq.rank[0]) - 1
        return None if at < 0 or self._least[at] is seq.group.tenant else self._least[at]

    def _look(self) -> None:
        roster = self._roster
        comes = [roster.waiting.first] if roster.waiting and roster.slot_free else []
        by_priority: dict[int, Tenant] = {}
        for seq in chain(roster.running, comes):
            tenant, priority = seq.group.tenant, seq.rank[0]
            if tenant.time < by_priority.setdefault(priority, tenant).time:
                by_priority[priority] = tenant
        for priority, tenant in sorted(by_priority.items(), key=itemgetter(0)):
            if self._least and self._least[-1].time <= tenant.time:
                tenant = self._least[-1]
            self._priorities.append(priority)
            self._least.append(tenant)
