"""Requests that come: whether one more may wait, and how it begins to.

Used by the scheduler: `check_queue` on the threads of those who submit, `add` on the engine's. Owns
the numbers of arrivals. Who goes first among those who wait is the business of fairness.py.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import Overloaded
from ..kv.cache import KVCache
from ..model.plan import RunnerSpec
from .limits import resolve_max_tokens
from .request import Request
from .roster import Roster
from .sequence import Group

MAX_RETRY_AFTER = 60.0
"""Seconds; the longest hint given to a caller who found the queue full."""


class Arrivals:
    """The door of one scheduler.

    Args:
      spec: the runner's sizes.
      roster: where requests go from here.
      cache: makes the chain of what a request's pages will hold.
      max_queue: requests of one tenant that may wait where no other asks.
      clock: seconds.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        roster: Roster,
        cache: KVCache,
        max_queue: int,
        clock: Callable[[], float],
    ):
        self._spec = spec
        self._roster = roster
        self._cache = cache
        self._max_queue = max_queue
        self._clock = clock
        self._count = 0  # of choices, in order of arrival

    def check_queue(self, tenant: str, pending: int, pending_of_tenant: int) -> None:
        """Raises Overloaded if a tenant has its part of the queue, with what is pending to come.

        That part is as large as what is left free of twice `max_queue`: a tenant alone may have
        `max_queue` waiting; n that flood have 2 / (n + 1) of it each, and leave as much free, so
        that others are not refused because of them.

        Who had to give way does not count: a tenant that floods gives way often.

        Safe from any thread: behind the back of whoever submits, the queue only gets shorter, or
        longer by further answers to requests that were accepted, which is harmless.
        """
        queue = self._roster.waiting
        known = queue.tenants.get(tenant)
        waiting = pending_of_tenant + (known.new if known else 0)
        most = 2 * self._max_queue - queue.new - pending
        if waiting >= most:
            last_wait = known.last_wait if known else 0.0
            hint = min(max(last_wait, 1.0), MAX_RETRY_AFTER)
            whose = f" of tenant {tenant!r}" if tenant else ""
            now = min(max(most, 0), self._max_queue)
            limit = f"at most {now} may now (max_queue {self._max_queue})"
            raise Overloaded(
                f"queue: {waiting} requests{whose} wait, {limit}; retry in {hint:.0f} s",
                retry_after=hint,
            )

    def add(self, request: Request, arrived: float | None) -> None:
        """Queues a request; where it raises, all is as if the request had never come."""
        choices, cache = request.sampling.choices, self._cache
        arrival = self._count
        self._count += choices
        # Without prefix caching the choices of a request still share what they have in common.
        is_private = choices > 1 and not cache.caching
        own = (request.id,) if is_private else ()
        salts = (request.tenant, request.cache_salt, *own)
        self._roster.add(
            Group(
                request=request,
                tenant=self._roster.waiting.tenant(request.tenant),
                arrival=arrival,
                arrived=self._clock() if arrived is None else arrived,
                max_tokens=resolve_max_tokens(request, self._spec),
                chain=cache.chain(request.adapter, *salts, private=is_private),
                is_private=is_private,
            )
        )
