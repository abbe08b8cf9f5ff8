"""How many tokens of a step are left for prompts, and whose.

Used by the planner, once a step. A step takes the longer the more prompt tokens it has, for all
rows in it. So while a tenant is served, those that have had more than it (fairness.py) get a part
of the step for their prompts, not all that decode rows leave: long prompts of one that floods would
else make every step as long as it can be, and leave no room for a newcomer's prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain
from operator import itemgetter

from .fairness import OUTPUT_COST
from .roster import Roster
from .sequence import Sequence
from .tenant import Tenant

LEAST_PART = 1 / 4
"""Of the longest step, for whoever is ahead, however few slots there are."""


def most_of_who_is_ahead(max_tokens: int, num_slots: int) -> int:
    """Tokens of a step, decode rows included, up to which prompts of tenants that are ahead may
    fill it: what a step costs in which all slots decode, so that it takes about twice as long."""
    return min(max_tokens, max(int(OUTPUT_COST * num_slots), int(LEAST_PART * max_tokens)))


class PromptRoom:
    """Of one step.

    Args:
      tokens: left by decode rows.
      ahead: of those, up to where prompts of tenants may go that are ahead of another.
      roster: who runs, and who is next.
    """

    def __init__(self, tokens: int, ahead: int, roster: Roster):
        self._left, self._ahead = tokens, ahead
        self._roster = roster
        self._limits = roster.waiting.contended and ahead < tokens
        self._priorities: list[int] = []
        self._least: list[Tenant] = []  # who has had least of all that have these or better ones

    def of(self, seq: Sequence) -> int:
        """Tokens left for its prompt."""
        return max(0, self._ahead if self._limits and self._is_ahead(seq) else self._left)

    def take(self, tokens: int) -> None:
        """So many of them are in the step."""
        self._left -= tokens
        self._ahead -= tokens

    def _is_ahead(self, seq: Sequence) -> bool:
        """Of a tenant that is served with the same priority or a better one."""
        if not self._priorities:
            self._look()
        at = bisect_right(self._priorities, seq.rank[0]) - 1
        if at < 0:
            return False
        tenant, least = seq.group.tenant, self._least[at]
        return tenant is not least and tenant.time > least.time

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
