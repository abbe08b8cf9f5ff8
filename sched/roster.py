"""Who waits and who runs, in which slot, with which pages: the life of requests and their choices.

    add, begin_next ──> waiting ──enter──> running ──end──> gone (a RequestOutput that says why)
                          ^  └───────────────│───────end──────^
                          └─────suspend──────┘

Used by the scheduler alone, which decides when. Owns slots and their generations. A choice leaves
in `_leave`, whatever the reason, and its request with the last of them in `_tell`; slot and pages
are given back in `_vacate`, each exactly once, and the pages registered that were not yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ..errors import Internal, QuireError, invalid
from ..kv.cache import KVCache, PrefixHit
from .fairness import FairQueue
from .ranked import Ranked
from .request import FinishReason, RequestOutput
from .sequence import Group, Sequence

log = logging.getLogger(__name__)


def our_fault(request_id: str, fault: Exception) -> Internal:
    """What callers, who may be anybody, hear of a fault; the log says what it was."""
    error = Internal(f"request {request_id!r}: a fault in Quire; the engine's log says more")
    error.__cause__ = fault
    return error


def by_rank(seq: Sequence) -> tuple[int, int]:
    """Order of service of those who run: lower priority numbers first, then earlier arrivals."""
    return seq.rank


def by_deadline(group: Group) -> tuple[float, int]:
    """Order of expiry, for requests that have a deadline."""
    return group.request.deadline or 0.0, group.arrival


class Roster:
    """All requests that have not ended.

    Args:
      num_slots: those of the device.
      cache: where sequences hold pages.
      clock: seconds.
    """

    def __init__(self, num_slots: int, cache: KVCache, clock: Callable[[], float]):
        self._cache = cache
        self._clock = clock
        self._by_id: dict[str, Group] = {}
        self._deadlines = Ranked[Group](by_deadline)
        self.waiting = FairQueue(clock)
        self.running = Ranked(by_rank)
        self.prefilling: set[Sequence] = set()  # running, with prompt tokens not yet scheduled
        self.outbox: list[RequestOutput] = []
        self.finished = 0
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._generations = [0] * num_slots

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def slot_free(self) -> bool:
        return bool(self._free_slots)

    def get(self, request_id: str) -> Group | None:
        return self._by_id.get(request_id)

    def add(self, group: Group) -> None:
        """A new request, whose first choice waits. All of it or, where that fails, nothing: no
        fault that a single request brings may cost the others."""
        if group.id in self._by_id:
            raise invalid("id", group.id, "unlike that of every unfinished request")
        seq = group.begin_next()
        assert seq is not None, "a request has a choice at least"
        try:
            self._by_id[group.id] = group
            if group.request.deadline is not None:
                self._deadlines.add(group)
            self.waiting.add(seq)
        except BaseException:
            self._by_id.pop(group.id, None)
            self._deadlines.discard(group)
            self.waiting.discard(seq)
            group.sequences.clear()
            raise

    def begin_next(self, group: Group) -> None:
        """The request's next choice waits, if there is one."""
        seq = group.begin_next()
        if seq is not None:
            self.waiting.add(seq)

    def enter(self, seq: Sequence, hit: PrefixHit) -> None:
        """A waiting sequence gets a slot, and the pages of its known prefix."""
        seq.kv = self._cache.open(seq.chain, hit)  # first: what may fail, while nothing has changed
        self.waiting.enter(seq)
        self.running.add(seq)
        self.prefilling.add(seq)
        seq.slot = self._free_slots.pop()
        self._generations[seq.slot] += 1
        seq.generation = self._generations[seq.slot]
        seq.target = len(seq.tokens)
        seq.prefilled = hit.tokens

    def suspend(self, seq: Sequence) -> None:
        """A running sequence gives up slot and pages, and waits where its arrival puts it among its
        tenant's."""
        self._vacate(seq)
        self.waiting.add(seq)

    def restart(self, fault: Exception) -> None:
        """All that have begun wait, without slots and pages.

        Goes by what requests know of themselves: a fault may have left half of a move behind. One
        that was about to end ends because of it.
        """
        groups = tuple(self._by_id.values())
        begun = [seq for group in groups for seq in group.sequences if not seq.ended]
        for seq in begun:
            seq.leave_slot()
        self._deadlines.clear()
        for group in groups:
            if group.request.deadline is not None:
                self._deadlines.add(group)
        self.running.clear()
        self.prefilling.clear()
        self._free_slots = list(range(self._num_slots - 1, -1, -1))
        self.waiting.restart(begun)
        self._cache.clear()
        for group in groups:
            if any(seq.ended and seq.choice in group.open for seq in group.sequences):
                self.fail(group, "ended", fault)

    def end(self, seq: Sequence, reason: FinishReason, output: RequestOutput | None = None) -> None:
        """Ends one choice, with the last it is to give."""
        self._leave(seq)
        if seq is seq.group.sequences[-1]:  # ended before its prompt was scheduled
            self.begin_next(seq.group)
        tokens = output.tokens if output else ()
        output = output or RequestOutput(seq.id, cached_tokens=seq.cached_tokens, choice=seq.choice)
        output.finish_reason = reason
        if reason is FinishReason.STOP and tokens and tokens[-1] in seq.stop_ids:
            output.stop_token = tokens[-1]
        self._tell(seq.group, output)

    def end_request(
        self, group: Group, reason: FinishReason, error: QuireError | None = None
    ) -> None:
        """Ends all choices of a request that have not: each with its own output, or all of them
        with the error."""
        unfinished = sorted(group.open)
        for seq in group.sequences:
            if not seq.ended:
                self._leave(seq)
        for choice in unfinished[:1] if error else unfinished:
            output = RequestOutput(
                group.id,
                finish_reason=reason,
                error=error,
                cached_tokens=max(0, group.cached_tokens),
                choice=choice,
            )
            self._tell(group, output, is_last=error is not None)

    def fail(self, group: Group, what: str, fault: Exception) -> None:
        """Ends a request because of a fault of ours; `what` was being done for it."""
        log.error("request %r could not be %s and ends", group.id, what, exc_info=fault)
        self.end_request(group, FinishReason.ERROR, our_fault(group.id, fault))

    def overdue(self, now: float) -> list[Group]:
        """Those whose deadline has passed."""
        late = []
        for group in self._deadlines:
            if by_deadline(group)[0] > now:
                break
            late.append(group)
        return late

    def check_integrity(self) -> None:
        """Proves that slots and pages are held by running sequences alone, each by one."""
        holders = list(self.running)
        slots = [seq.slot for seq in holders] + self._free_slots
        if sorted(slots) != list(range(self._num_slots)):
            raise RuntimeError(f"slots lost or held twice: {sorted(slots)}")
        begun = sum(not seq.ended for group in self._by_id.values() for seq in group.sequences)
        if len(self.waiting) + len(holders) != begun:
            raise RuntimeError("a choice that has begun neither waits nor runs")
        for group in self._by_id.values():
            if not group.open or any(s.ended == (s.choice in group.open) for s in group.sequences):
                raise RuntimeError(f"request {group.id!r} outlived its choices, or they it")
        dated = {group for group in self._by_id.values() if group.request.deadline is not None}
        if len(self._deadlines) != len(dated) or set(self._deadlines) != dated:
            raise RuntimeError("the list of deadlines is wrong")
        if self.prefilling != {seq for seq in holders if seq.prefilling}:
            raise RuntimeError("the set of prefilling sequences is wrong")
        for seq in holders:
            if seq.generation != self._generations[seq.slot] or seq.ended:
                raise RuntimeError(f"request {seq.id!r} runs in a slot it lost")
            if seq.scheduled > seq.kv.capacity:
                raise RuntimeError(f"request {seq.id!r} has more tokens than page room")
        self.waiting.check_integrity(holders)
        self._cache.check_integrity(seq.kv for seq in holders)

    def _leave(self, seq: Sequence) -> None:
        seq.ended = True
        if seq.slot >= 0:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)

    def _tell(self, group: Group, output: RequestOutput, *, is_last: bool = False) -> None:
        """The last output of a choice, and perhaps of its request: of all that are open, or where
        it `is_last` all the same."""
        if not (is_last or group.open == {output.choice}):
            group.open.remove(output.choice)
            self.outbox.append(output)
            return
        now = self._clock()
        output.ended, output.timing, output.account = True, group.timing(now), group.account(now)
        group.open.clear()
        self.outbox.append(output)
        del self._by_id[group.id]
        if group.request.deadline is not None:
            self._deadlines.remove(group)
        if group.is_private:
            for seq in group.sequences:
                self._cache.forget_chain(seq.chain)
        group.sequences.clear()  # they know their group: a cycle would keep both for the collector
        self.finished += 1

    def _vacate(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.waiting.leave(seq)
        self.prefilling.discard(seq)
        self._keep_answer(seq)
        self._cache.release(seq.kv)
        self._free_slots.append(seq.slot)
        seq.leave_slot()

    def _keep_answer(self, seq: Sequence) -> None:
        """The pages that it filled are found from now on. They need not be: a fault here keeps it
        from leaving only if it left the index in disorder."""
        if seq.prefilling:  # the planner registered what was computed
            return
        try:
            self._cache.register(seq.kv, seq.tokens, len(seq.tokens) - 1)  # the last has no KV yet
        except Exception:
            log.exception("request %r: the pages of its answer will not be found again", seq.id)
            self._cache.check_index()
