"""Who waits and who runs, in which slot, with which pages: the life of a sequence.

    add ──> waiting ──enter──> running ──end──> gone (one RequestOutput with a finish_reason)
              ^  └───────────────│───────end──────^
              └─────suspend──────┘

Used by the scheduler alone, which decides when. Owns slots and their generations. A request ends in
`end`, whatever the reason, and slot and pages are given back in `_vacate`, each exactly once.
"""

from __future__ import annotations

from ..errors import QuireError, invalid
from ..kv.cache import KVCache, PrefixHit
from .policy import Ranked, by_deadline, by_rank
from .request import FinishReason, RequestOutput, TokenLogprobs
from .sequence import Sequence


class Roster:
    """All sequences that have not ended."""

    def __init__(self, num_slots: int, cache: KVCache):
        self._cache = cache
        self._by_id: dict[str, Sequence] = {}
        self._deadlines = Ranked(by_deadline)
        self.waiting = Ranked(by_rank)
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

    def get(self, request_id: str) -> Sequence | None:
        return self._by_id.get(request_id)

    def add(self, seq: Sequence) -> None:
        """A new sequence, which waits."""
        request = seq.request
        if request.id in self._by_id:
            raise invalid("id", request.id, "unlike that of every unfinished request")
        self._by_id[request.id] = seq
        self.waiting.add(seq)
        if request.deadline is not None:
            self._deadlines.add(seq)

    def enter(self, seq: Sequence, hit: PrefixHit) -> None:
        """A waiting sequence gets a slot, and the pages of its known prefix."""
        self.waiting.remove(seq)
        self.running.add(seq)
        self.prefilling.add(seq)
        seq.slot = self._free_slots.pop()
        self._generations[seq.slot] += 1
        seq.generation = self._generations[seq.slot]
        seq.kv = self._cache.open(seq.chain, hit)
        seq.target = len(seq.tokens)
        seq.prefilled = hit.tokens

    def suspend(self, seq: Sequence) -> None:
        """A running sequence gives up slot and pages, and waits where its arrival puts it."""
        self._vacate(seq)
        self.waiting.add(seq)

    def end(
        self,
        seq: Sequence,
        reason: FinishReason,
        *,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        error: QuireError | None = None,
    ) -> None:
        """The one place where a request ends: finish, abort, deadline or error."""
        if seq.slot >= 0:
            self._vacate(seq)
        else:
            self.waiting.remove(seq)
        if seq.request.deadline is not None:
            self._deadlines.remove(seq)
        del self._by_id[seq.id]
        seq.ended = True
        self.finished += 1
        at_stop = reason is FinishReason.STOP and tokens and tokens[-1] in seq.stop_ids
        self.outbox.append(
            RequestOutput(
                request_id=seq.id,
                tokens=tokens,
                logprobs=logprobs,
                finish_reason=reason,
                stop_token=tokens[-1] if at_stop else None,
                error=error,
                cached_tokens=max(0, seq.cached_tokens),
            )
        )

    def overdue(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed."""
        late = []
        for seq in self._deadlines:
            if by_deadline(seq)[0] > now:
                break
            late.append(seq)
        return late

    def check_integrity(self) -> None:
        """Proves that slots and pages are held by running sequences alone, each by one."""
        holders = list(self.running)
        slots = [seq.slot for seq in holders] + self._free_slots
        if sorted(slots) != list(range(self._num_slots)):
            raise RuntimeError(f"slots lost or held twice: {sorted(slots)}")
        if len(self.waiting) + len(holders) != len(self._by_id):
            raise RuntimeError("a sequence neither waits nor runs")
        if self.prefilling != {seq for seq in holders if seq.prefilling}:
            raise RuntimeError("the set of prefilling sequences is wrong")
        for seq in holders:
            if seq.generation != self._generations[seq.slot] or seq.ended:
                raise RuntimeError(f"request {seq.id!r} runs in a slot it lost")
            if seq.scheduled > seq.kv.capacity:
                raise RuntimeError(f"request {seq.id!r} has more tokens than page room")
        self._cache.check_integrity(seq.kv for seq in holders)

    def _vacate(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.prefilling.discard(seq)
        self._cache.release(seq.kv)
        self._free_slots.append(seq.slot)
        seq.slot = -1
        seq.target = seq.prefilled = seq.unread = seq.in_flight = 0
