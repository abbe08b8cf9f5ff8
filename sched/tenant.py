"""What the scheduler knows of one tenant. Made and kept by fairness.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from .ranked import Ranked


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant, while it has requests, or is ahead of the others.

    Attributes:
      name: as in Request.tenant.
      weight: its share, relative to other tenants' weights.
      time: its virtual time: cost of what was computed for it, in prompt tokens, by its weight.
      waiting: its sequences without a slot, in order of priority, then arrival.
      new: how many of those never had one.
      running: how many have one.
      last_wait: seconds its latest admission had waited.
      entry: where it stands in the queue's heap: priority and arrival of the first that waits, and
        the virtual time between them; None while none waits.
      ahead: its virtual time when it was last noted as ahead of the others.
    """

    name: str
    weight: float
    time: float
    waiting: Ranked[Any] = field(default_factory=lambda: Ranked(attrgetter("rank")))
    new: int = 0
    running: int = 0
    last_wait: float = 0.0
    entry: tuple[int, float, int, Tenant] | None = None
    ahead: float = -1.0

    @property
    def active(self) -> bool:
        return bool(self.running or self.waiting)

    def charge(self, cost: float) -> None:
        """So much was computed for it."""
        self.time += cost / self.weight
