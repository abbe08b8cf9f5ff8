"""Who waits, tenant by tenant: weighted fair queueing over the tokens that the device computed.

Used by the roster, which tells it who comes and goes, and by the scheduler, which tells it what was
computed and asks who is next. Owns what is known of each tenant.

Each tenant has a virtual time: the cost of what was computed for it, by its weight. Of the requests
of the best priority that wait, those of the tenant with the least virtual time go first (within a
tenant: by priority, then arrival). This is start-time fair queueing with costs counted as they
arise, because nobody knows an answer's length beforehand: whoever asks all the time gets its
weight's share of the tokens, however many requests it has waiting.

Who asks at random times needs more than its share now and less then. So a tenant that begins to
wait keeps what it left unused of its share in the last CREDIT_SECONDS, and is brought up to the
virtual time of then if it is behind that: nobody gains more credit by asking little. With a single
tenant nothing is counted.

Virtual times only grow, so a heap with entries that may be out of date finds the least of them:
O(log tenants) an admission.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import compress
from operator import attrgetter

from .sequence import Sequence
from .tenant import Tenant

OUTPUT_COST = 4.0
"""Cost of an output token, in prompt tokens; about what both take of a device that serves many."""
CREDIT_SECONDS = 60.0
"""How long unused share counts."""

_NOTE_EVERY = 1.0  # seconds between notes of the virtual time
_TENANT = attrgetter("group.tenant")


class FairQueue(Collection[Sequence]):
    """The sequences that wait, in order of service.

    Args:
      clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.tenants: dict[str, Tenant] = {}  # the active ones, and those that were lately
        self.active_weight = 0.0
        self.new = 0  # waiting sequences that never ran
        self._weights: Mapping[str, float] = {}
        self._active = 0
        self._now = 0.0  # the latest virtual time at which a request was admitted
        self._notes: deque[tuple[float, float]] = deque()  # clock, and the virtual time then
        self._heap: list[tuple[int, float, int, Tenant]] = []
        self._ahead: list[tuple[float, str]] = []  # inactive tenants, until `_floor` reaches them
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """In no order."""
        for tenant in self.tenants.values():
            yield from tenant.waiting

    def __contains__(self, item: object) -> bool:
        return isinstance(item, Sequence) and item in item.group.tenant.waiting

    @property
    def contended(self) -> bool:
        """Whether there is more than one tenant to be fair to."""
        return len(self.tenants) > 1

    @property
    def credit(self) -> float:
        """Virtual time that a tenant may be behind by what it left unused."""
        return self._now - self._floor

    @property
    def first(self) -> Sequence:
        """Who is served next."""
        heap = self._heap
        while True:
            entry = heap[0]
            tenant = entry[3]
            if entry is not tenant.entry:
                heapq.heappop(heap)
            elif entry[1] != tenant.time:
                tenant.entry = (entry[0], tenant.time, entry[2], tenant)
                heapq.heapreplace(heap, tenant.entry)
            else:
                return tenant.waiting.first

    # ---- tenants

    def tenant(self, name: str) -> Tenant:
        """The one of this name, for a request that is about to wait."""
        found = self.tenants.get(name)
        return found or Tenant(name, self._weights.get(name, 1.0), self._floor)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares of the tenants from now on; 1 for those not named."""
        self._weights = dict(weights)
        for tenant in self.tenants.values():
            tenant.weight = self._weights.get(tenant.name, 1.0)
        self.active_weight = sum(t.weight for t in self.tenants.values() if t.active)

    def charge_rows(self, rows: Collection[Sequence], counts: Collection[int]) -> None:
        """So many output tokens were computed for these sequences."""
        for count in set(counts) - {0}:  # nearly always 1 and no other: no loop of ours over rows
            some = compress(rows, map(count.__eq__, counts))
            for tenant, times in Counter(map(_TENANT, some)).items():
                tenant.charge(times * count * OUTPUT_COST)

    def share(self, tenant: Tenant, total: int) -> float:
        """What it may hold of `total` things while all active tenants want more; one at least."""
        return max(1.0, total * tenant.weight / self.active_weight)

    # ---- sequences come and go

    def add(self, seq: Sequence) -> None:
        """It begins to wait."""
        tenant = seq.group.tenant
        self._activate(tenant)
        if not tenant.waiting:
            tenant.time = max(tenant.time, self._floor)
        tenant.waiting.add(seq)
        self._count += 1
        if not seq.generation:
            tenant.new += 1
            self.new += 1
        if tenant.waiting.first is seq:
            self._push(tenant)

    def enter(self, seq: Sequence) -> None:
        """It got a slot."""
        tenant = seq.group.tenant
        tenant.running += 1
        if tenant.time > self._now:
            self._advance(tenant.time)
        self._take(seq)

    def remove(self, seq: Sequence) -> None:
        """It ended before it got a slot."""
        self._take(seq)
        self._deactivate(seq.group.tenant)

    def leave(self, seq: Sequence) -> None:
        """It lost its slot."""
        seq.group.tenant.running -= 1
        self._deactivate(seq.group.tenant)

    def discard(self, seq: Sequence) -> None:
        """Undoes an `add` that failed, however far it came: all that it may have counted is counted
        anew."""
        tenant = seq.group.tenant
        tenant.waiting.discard(seq)
        self._count_anew()
        if tenant.name in self.tenants and not tenant.active:
            self._part(tenant)

    def restart(self, waiting: Iterable[Sequence]) -> None:
        """These are all there are, and none of them runs; what was known of who waits and runs may
        be wrong. Tenants keep their virtual times."""
        for tenant in self.tenants.values():
            tenant.waiting.clear()
            tenant.running = 0
        for seq in waiting:
            tenant = seq.group.tenant
            self.tenants[tenant.name] = tenant
            tenant.waiting.add(seq)
        self._count_anew()
        for tenant in [each for each in self.tenants.values() if not each.active]:
            if tenant.name in self.tenants:  # else nobody is left, and all are forgotten
                self._part(tenant)

    def _count_anew(self) -> None:
        self._count = self.new = self._active = 0
        self.active_weight = 0.0
        for each in self.tenants.values():
            each.new = sum(not waiting.generation for waiting in each.waiting)
            each.entry = (*self._key(each), each) if each.waiting else None
            self._count += len(each.waiting)
            self.new += each.new
            if each.active:
                self._active += 1
                self.active_weight += each.weight
        self._heap = [each.entry for each in self.tenants.values() if each.entry is not None]
        heapq.heapify(self._heap)

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Proves that counts, order and memory are what they should be."""
        counts = dict.fromkeys(self.tenants, 0)
        for seq in running:
            counts[seq.group.tenant.name] += 1
        tenants = list(self.tenants.values())
        if any(counts[tenant.name] != tenant.running for tenant in tenants):
            raise RuntimeError("a tenant's running answers are miscounted")
        if self._count != sum(len(tenant.waiting) for tenant in tenants):
            raise RuntimeError("waiting answers are miscounted")
        new = [sum(not seq.generation for seq in tenant.waiting) for tenant in tenants]
        if new != [tenant.new for tenant in tenants] or sum(new) != self.new:
            raise RuntimeError("answers that never ran are miscounted")
        active = [tenant for tenant in tenants if tenant.active]
        weight = sum(tenant.weight for tenant in active)
        if len(active) != self._active or abs(weight - self.active_weight) > 1e-6 * weight:
            raise RuntimeError("active tenants are miscounted")
        if any(not t.active and t.time <= self._floor for t in tenants):
            raise RuntimeError("a tenant that is gone is remembered")
        if self._count:
            first, key = self.first, self._key
            if key(first.group.tenant) != min(key(t) for t in tenants if t.waiting):
                raise RuntimeError("the first in the queue is not the first")

    # ---- inside

    @staticmethod
    def _key(tenant: Tenant) -> tuple[int, float, int]:
        priority, arrival = tenant.waiting.first.rank
        return priority, tenant.time, arrival

    def _push(self, tenant: Tenant) -> None:
        tenant.entry = (*self._key(tenant), tenant)
        heapq.heappush(self._heap, tenant.entry)
        if len(self._heap) > 2 * self._active + 16:
            self._heap = [e for e in self._heap if e is e[3].entry]
            heapq.heapify(self._heap)

    def _take(self, seq: Sequence) -> None:
        tenant = seq.group.tenant
        was_first = tenant.waiting.first is seq
        tenant.waiting.remove(seq)
        self._count -= 1
        if not seq.generation:
            tenant.new -= 1
            self.new -= 1
        if not was_first:
            return
        if tenant.waiting:
            self._push(tenant)
        else:
            tenant.entry = None

    def _activate(self, tenant: Tenant) -> None:
        if not tenant.active:
            self.tenants[tenant.name] = tenant
            self._active += 1
            self.active_weight += tenant.weight

    def _deactivate(self, tenant: Tenant) -> None:
        if tenant.active:
            return
        self._active -= 1
        self.active_weight -= tenant.weight
        self._part(tenant)

    def _part(self, tenant: Tenant) -> None:
        """One that is not active any more is forgotten, or remembered while it is ahead."""
        if not self._active:  # nobody is left to be fair to
            self._now = max(self._now, *(t.time for t in self.tenants.values()))
            self.tenants.clear()
            self._heap.clear()
            self._ahead.clear()
            self._notes.clear()
            self.active_weight = 0.0
        elif tenant.time <= self._floor:
            del self.tenants[tenant.name]
        else:  # what it had counts if it comes back
            self._remember(tenant)

    @property
    def _floor(self) -> float:
        """The virtual time of CREDIT_SECONDS ago."""
        return self._notes[0][1] if self._notes else self._now

    def _advance(self, now: float) -> None:
        """The virtual time moves on; forgets tenants that nothing sets apart from new ones."""
        notes, clock = self._notes, self._clock()
        if not notes or clock - notes[-1][0] >= _NOTE_EVERY:
            notes.append((clock, self._now))
        self._now = now
        while len(notes) > 1 and notes[1][0] <= clock - CREDIT_SECONDS:
            notes.popleft()
        while self._ahead and self._ahead[0][0] <= self._floor:
            tenant = self.tenants.get(heapq.heappop(self._ahead)[1])
            if tenant is None or tenant.active:
                continue
            if tenant.time <= self._floor:
                del self.tenants[tenant.name]
            else:  # results that came after it had gone
                self._remember(tenant)

    def _remember(self, tenant: Tenant) -> None:
        if tenant.time > tenant.ahead:  # else it is noted
            tenant.ahead = tenant.time
            heapq.heappush(self._ahead, (tenant.time, tenant.name))
