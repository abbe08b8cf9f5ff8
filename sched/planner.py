"""Who runs in the next step, with which tokens and pages.

Used by the scheduler, once a step:

    make_place          (pressure.py) who waits too long takes another's place
    decode rows, and the next chunks of prompts of those who run already, in the room there is for
                        whose they are (prompt_room.py)
    newcomers           slots, pages and first chunks, in order of service, in the tokens left
    build               (plan_builder.py) -> Flight

What is planned is noted in the sequences at once. A plan may be made before the results of the last
one are known; what is known of a running row's position is then an upper bound, and pages are
granted by it.

Progress is certain: `plan` goes through the running sequences in order of service and takes pages
from others than the first, so that one runs, or waits for results that are on their way.

A fault that comes up while one sequence is planned for ends the plan there. What was planned before
it is sound and is launched, be it a row of that very sequence: whoever was to come after it goes on
in the next step, when the scheduler has ended its request.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..kv.cache import KVCache, PrefixHit
from ..model.plan import RunnerSpec
from . import policy
from .plan_builder import Flight, StepBuilder
from .pressure import Pressure
from .prompt_room import PromptRoom
from .roster import Roster
from .sequence import Sequence, richest
from .stats import Meters


class Planner:
    """Plans the steps of one scheduler.

    Attributes:
      failed: for whom the last plan found a fault, and the fault; None: for nobody.

    Args:
      spec: the runner's sizes.
      roster: who waits and who runs.
      cache: their pages.
      meters: told of who enters, and of what is computed again.
      clock: seconds.
      max_batched_tokens: tokens in one step at most.
      prefill_chunk: tokens of one prompt in one step at most.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        roster: Roster,
        cache: KVCache,
        meters: Meters,
        clock: Callable[[], float],
        *,
        max_batched_tokens: int,
        prefill_chunk: int,
    ):
        self._spec = spec
        self._roster = roster
        self._cache = cache
        self._meters = meters
        self._clock = clock
        self._max_tokens = min(max_batched_tokens, spec.ladder.max_tokens)
        self._max_rows = min(self._max_tokens, spec.ladder.max_rows)
        self._prefill_chunk = prefill_chunk
        self.pressure = Pressure(roster, cache, meters)
        self.failed: tuple[Sequence, Exception] | None = None

    def plan(self) -> Flight | None:
        """The next step, or None when nothing can run before results arrive, or nothing because of
        who `failed`. Raises for faults that are nobody's."""
        self.failed = None
        self.pressure.make_place()
        step = StepBuilder(self._decode_tokens())
        room = self._go_on(step)
        if self.failed is None:
            self._admit(step, room)
        return step.build(self._spec.ladder) if step.rows else None

    def _decode_tokens(self) -> int:
        roster = self._roster
        return policy.decode_tokens(
            self._spec,
            roster.running,
            len(roster.prefilling),
            len(roster.waiting),
            self._cache,
        )

    def _go_on(self, step: StepBuilder) -> PromptRoom:
        """Rows for those who run already; returns what is left for newcomers.

        One pass in order of service.
        """
        running, prefilling = self._roster.running, self._roster.prefilling
        pressure, k, rows_left = self.pressure, step.k, self._max_rows
        decodes, starts = step.decodes, step.decode_starts
        decoding = len(running) - len(prefilling)
        most = self._max_tokens
        if decoding and (prefilling or self._roster.waiting):
            most = policy.step_tokens(self._spec.ladder, most, decoding, richest(running))
        room = PromptRoom(most, self._spec.num_slots, decoding, self._roster)
        for seq in tuple(running):
            # Every row of every step passes here: one that decodes and has room costs no call.
            try:
                if seq.slot < 0 or seq is pressure.resting:  # gave way, or is about to
                    continue
                if seq.prefilled < seq.target:
                    if rows_left and self._prompt(step, seq, room):
                        rows_left -= 1
                    continue
                start = len(seq.tokens) - 1 + seq.unread
                limit = seq.limit
                # At the limit, its last token is on the way; should fewer arrive, it runs again.
                if start >= limit or not rows_left:
                    continue
                end = start + k if start + k < limit else limit
                if end <= seq.kv.capacity or self._grow(step, seq, end):
                    decodes.append(seq)
                    starts.append(start)
                    seq.unread += k
                    seq.in_flight += 1
                    rows_left -= 1
            except Exception as fault:
                self.failed = seq, fault
                break
        return room

    def _admit(self, step: StepBuilder, room: PromptRoom) -> None:
        """Slots, pages and first chunks for those who wait, strictly in order of service."""
        roster, cache, recompute = self._roster, self._cache, self._meters.recompute
        self.pressure.is_short = False
        while roster.waiting and roster.slot_free and step.rows < self._max_rows:
            seq = roster.waiting.first
            if not room.of(seq):
                return
            worst = recompute.ratio > policy.MAX_RECOMPUTE_RATIO
            reserved = policy.reserved_pages(
                roster.running, roster.prefilling, cache, worst_case=worst
            )
            try:
                # A prompt token that is found instead of computed has no log-probability.
                most = len(seq.group.scores) if seq.unscored else sys.maxsize
                hit = cache.match(seq.chain, seq.tokens, most)
                may = policy.may_enter(seq, hit, reserved, cache, worst_case=worst)
                if not may and not policy.fits_over_time(seq, hit, roster.running, cache):
                    self.pressure.is_short = True
                    return
                roster.enter(seq, hit)
                step.init(seq)
                step.pages(seq.slot, 0, seq.kv.pages)
                self._count_entry(seq, hit)
                # Not from those who came in this very step: the step tells the device of them.
                self._prompt(step, seq, room, may_take=not roster.waiting.contended)
            except Exception as fault:
                self.failed = seq, fault
                return

    def _prompt(
        self, step: StepBuilder, seq: Sequence, room: PromptRoom, *, may_take: bool = True
    ) -> bool:
        """The next chunk of a prompt, if there is room for it, and pages, taken from others where
        it may; whether there is one."""
        start = seq.prefilled
        end = min(start + self._prefill_chunk, start + room.of(seq), seq.target)
        if end == start:
            return False
        if end > seq.kv.capacity and not self._grow(step, seq, end, may_take=may_take):
            return False
        room.take(seq, end - start)
        step.prompt(seq, start, end)
        seq.prefilled = end
        if end == seq.target:
            self._roster.prefilling.discard(seq)
        # Others may share these pages at once, even within this step: the device runs plans in
        # order, and in each layer it writes all K/V of a step before it reads any.
        self._cache.register(seq.kv, seq.tokens, end)
        if end == seq.target and seq is seq.group.sequences[-1]:
            self._roster.begin_next(seq.group)
        again = max(0, min(end, seq.recompute_until) - start)
        if self._roster.waiting.contended:
            seq.group.tenant.charge(end - start - again)
        self._meters.recompute.count(end - start - again, again)
        return True

    def _grow(
        self, step: StepBuilder, seq: Sequence, positions: int, *, may_take: bool = True
    ) -> bool:
        """Whether a sequence has pages for `positions`, if need be now."""
        added = self.pressure.grow(seq, positions, may_take=may_take)
        if added is None:
            return False
        step.pages(seq.slot, len(seq.kv.pages) - len(added), added)
        return True

    def _count_entry(self, seq: Sequence, hit: PrefixHit) -> None:
        """An admission, which counts once for all choices, however often they have to give way."""
        group = seq.group
        if group.cached_tokens < 0:
            group.cached_tokens = hit.tokens
            self._meters.enter(seq.prompt_len, hit.tokens)
            group.admitted = self._clock()
            group.tenant.last_wait = group.admitted - group.arrived
        seq.cached_tokens = group.cached_tokens
