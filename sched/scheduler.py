"""Which tokens run next. Called by the engine's loop, from one thread.

    submit(), finish()         requests come and go
    schedule() -> StepPlan     who runs in the next step, with which pages
    update(plan, outputs)      what a step gave, one step late

Owns the sequences (through Roster), the pages (through KVCache) and the plans in flight. A plan may
be made before the results of the last one are known; what is known of a running row's position is
then an upper bound, and pages are granted by it.

Progress is certain: `schedule` goes through the running sequences in order of service and takes
pages from others than the first, so that one runs, or waits for results that are on their way.
`schedule` returns None only when nothing can be done before results arrive.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from ..errors import DeadlineExceeded, Internal, Overloaded, QuireError
from ..kv.cache import KVCache, PrefixHit
from ..model.plan import LogprobArrays, RunnerSpec, StepOutputs, StepPlan
from . import policy
from .limits import check_reason, check_request, resolve_max_tokens
from .plan_builder import Flight, StepBuilder
from .request import FinishReason, Request, RequestOutput
from .results import accept, embedding_of, gather_scores, logprobs_of, pooled_rows
from .roster import Roster, by_deadline
from .sequence import Group, Sequence
from .stats import EngineStats, Meters

MAX_RETRY_AFTER = 60.0
"""Seconds; the longest hint given to a caller who found the queue full."""


class Scheduler:
    """Continuous batching with chunked prompts, prefix sharing and preemption by recompute.

    Args:
      spec: the runner's sizes.
      max_batched_tokens: tokens in one step at most.
      prefill_chunk: tokens of one prompt in one step at most.
      prefix_caching: share the KV of equal prompt prefixes.
      max_queue: requests that may wait before more are refused, where one tenant asks; several
        share twice the room, see `check_queue`.
      clock: seconds, on the scale of Request.deadline.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        *,
        max_batched_tokens: int,
        prefill_chunk: int,
        prefix_caching: bool = True,
        max_queue: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._spec = spec
        self._max_tokens = min(max_batched_tokens, spec.ladder.max_tokens)
        self._max_rows = min(self._max_tokens, spec.ladder.max_rows)
        self._prefill_chunk = prefill_chunk
        self._max_queue = max_queue
        self._clock = clock
        self._cache = KVCache(spec.num_pages, spec.page_size, prefix_caching=prefix_caching)
        self._roster = Roster(spec.num_slots, self._cache, clock)
        self._flights: deque[Flight] = deque()  # planned, results not read; oldest first
        self._resting: Sequence | None = None  # sits out this step, so as to give way in the next
        self._asked: Sequence | None = None  # shall sit out the next, because it is in this one
        self._is_short = False  # the first in the queue found no pages
        self._arrivals = 0

        self._meters = Meters(clock)

    # ---- requests come and go

    def now(self) -> float:
        """Seconds, on the scale of Request.deadline."""
        return self._clock()

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._roster)

    def validate(self, request: Request) -> None:
        """Raises InvalidRequest if this request can never be served. Safe from any thread."""
        check_request(request, self._spec)

    def check_queue(self, tenant: str = "", pending: int = 0, pending_of_tenant: int = 0) -> None:
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
            limit = f"at most {min(max(most, 0), self._max_queue)} may"
            raise Overloaded(
                f"queue: {waiting} requests{whose} wait, {limit}; retry in {hint:.0f} s",
                retry_after=hint,
            )

    def submit(self, request: Request) -> None:
        """Queues a request, or says why not (InvalidRequest, Overloaded)."""
        self.validate(request)
        self.check_queue(request.tenant)
        self.add(request)

    def add(self, request: Request, arrived: float | None = None) -> None:
        """Queues a request that `validate` and `check_queue` let pass; where it raises, all is as
        if the request had never come.

        Args:
          request: new.
          arrived: by the clock; None is now.
        """
        choices, cache = request.sampling.choices, self._cache
        arrival = self._arrivals
        self._arrivals += choices
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

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Shares of the tenants from now on, above 0; those not named have 1."""
        self._roster.waiting.set_weights(weights)

    def finish(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        choice: int | None = None,
    ) -> None:
        """Ends a request early, or one of its choices: the caller left, or found a stop string.

        Idempotent.
        """
        check_reason(reason)
        group = self._roster.get(request_id)
        if group is None:
            return
        if choice is None:
            self._roster.end_request(group, reason)
        elif choice in group.open and choice < len(group.sequences):
            self._roster.end(group.sequences[choice], reason)

    def take_outputs(self) -> list[RequestOutput]:
        """What became of requests since this was last called, in order."""
        outputs, self._roster.outbox = self._roster.outbox, []
        return outputs

    # ---- a step is planned

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before results arrive."""
        self._expire()
        self._make_place()
        step = StepBuilder(self._decode_tokens())
        room = self._plan_running(step)
        self._admit(step, room)
        self._observe_waste()
        return self._depart(step.build(self._spec.ladder)) if step.rows else None

    def _decode_tokens(self) -> int:
        roster = self._roster
        return policy.decode_tokens(
            self._spec,
            roster.running,
            len(roster.prefilling),
            len(roster.waiting),
            self._cache,
        )

    def _make_place(self) -> None:
        """A tenant that runs less than its share does not wait for others' long answers to end.

        Who gives way must be collected first: it rests for a step, and goes in the next.
        """
        asked, self._asked = self._asked, None
        roster = self._roster
        running, queue = roster.running, roster.waiting
        is_valid = asked is not None and asked.slot >= 0 and asked is not running.first
        self._resting = asked if is_valid else None
        if not queue.contended or not queue or (roster.slot_free and not self._is_short):
            return
        if self._meters.recompute.ratio > policy.MAX_FAIR_RECOMPUTE_RATIO:
            return
        victim = policy.gives_place(running, queue)
        if victim is not None:
            self._give_way(self._resting or victim)

    def _give_way(self, victim: Sequence) -> bool:
        """Preempts a sequence, or has it rest if it is in flight; whether it is gone."""
        if victim.in_flight:
            self._resting = victim
            if self._roster.waiting.contended:  # it may be part of this step already
                self._asked = victim
            return False
        self._resting = None
        self._preempt(victim)
        return True

    def _plan_running(self, step: StepBuilder) -> int:
        """Rows for those who run already; returns the tokens left for newcomers.

        One pass in order of service.
        """
        running, prefilling = self._roster.running, self._roster.prefilling
        k, rows_left = step.k, self._max_rows
        prompt_room = self._max_tokens - (len(running) - len(prefilling))
        for seq in tuple(running):
            if seq.slot < 0 or seq is self._resting:  # gave way, or is about to
                continue
            if seq.prefilled < seq.target:
                if prompt_room > 0 and rows_left:
                    taken = self._plan_prompt(step, seq, prompt_room)
                    prompt_room -= taken
                    rows_left -= taken > 0
                continue
            start = len(seq.tokens) - 1 + seq.unread
            limit = seq.limit
            # At the limit, its last token is on the way; should fewer arrive, it runs again.
            if start >= limit or not rows_left:
                continue
            end = start + k if start + k < limit else limit
            if end <= seq.kv.capacity or self._grow(step, seq, end):
                step.decode(seq, start)
                rows_left -= 1
        return prompt_room

    def _plan_prompt(
        self, step: StepBuilder, seq: Sequence, room: int, *, may_take: bool = True
    ) -> int:
        """The next chunk of a prompt, if there are pages for it, taken from others where it may;
        returns the tokens taken."""
        start = seq.prefilled
        end = min(start + self._prefill_chunk, start + room, seq.target)
        if end > seq.kv.capacity and not self._grow(step, seq, end, may_take=may_take):
            return 0
        step.prompt(seq, start, end)
        seq.prefilled = end
        if end == seq.target:
            self._roster.prefilling.discard(seq)
        # Others may share these pages at once, even within this step: the device runs plans in
        # order, and in each layer it writes all K/V of a step before it reads any.
        if end >= seq.kv.index_at:
            self._cache.register(seq.kv, seq.tokens, end)
        if end == seq.target and seq is seq.group.sequences[-1]:
            self._roster.begin_next(seq.group)
        again = max(0, min(end, seq.recompute_until) - start)
        if self._roster.waiting.contended:
            seq.group.tenant.charge(end - start - again)
        self._meters.recompute.count(end - start - again, again)
        return end - start

    def _admit(self, step: StepBuilder, room: int) -> None:
        """Slots, pages and first chunks for those who wait, strictly in order of service."""
        roster, cache = self._roster, self._cache
        self._is_short = False
        while room > 0 and roster.waiting and roster.slot_free and step.rows < self._max_rows:
            seq = roster.waiting.first
            # A prompt token that is found instead of computed has no log-probability.
            most = len(seq.group.scores) if seq.unscored else sys.maxsize
            hit = cache.match(seq.chain, seq.tokens, most)
            worst = self._meters.recompute.ratio > policy.MAX_RECOMPUTE_RATIO
            reserved = policy.reserved_pages(
                roster.running, roster.prefilling, cache, worst_case=worst
            )
            if not policy.may_enter(seq, hit, reserved, cache, worst_case=worst):
                self._is_short = True
                return
            roster.enter(seq, hit)
            step.init(seq)
            step.pages(seq.slot, 0, seq.kv.pages)
            self._count_entry(seq, hit)
            # Not from those who came in this very step: the step tells the device of them.
            room -= self._plan_prompt(step, seq, room, may_take=not roster.waiting.contended)

    def _grow(
        self, step: StepBuilder, seq: Sequence, positions: int, *, may_take: bool = True
    ) -> bool:
        """Pages for `positions` of a sequence, taken from another if need be.

        False: it sits this step out. Either it is the one to give way itself, and keeps what it has
        until somebody needs it; or results of that one are on their way, and are read before it
        gives way: it rests, so that none will be on their way.
        """
        roster = self._roster
        while (added := self._cache.grow(seq.kv, positions)) is None:
            if not may_take:
                return False
            victim = self._resting or policy.gives_way(roster.running, roster.waiting)
            if victim is seq or not self._give_way(victim):
                return False
        step.pages(seq.slot, len(seq.kv.pages) - len(added), added)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Takes pages and slot; what was computed is computed again, or found in the index."""
        self._meters.counters.preemptions += 1
        seq.group.preemptions += 1
        seq.recompute_until = max(seq.recompute_until, seq.scheduled)
        self._roster.suspend(seq)

    def _depart(self, flight: Flight) -> StepPlan:
        """Counts a step that is about to be launched."""
        self._flights.append(flight)
        self._meters.depart(flight.plan)
        return flight.plan

    # ---- its results arrive

    def update(self, plan: StepPlan, outputs: StepOutputs) -> list[RequestOutput]:
        """Takes in what the oldest launched step gave; returns all outputs since the last call."""
        flight = self._flights.popleft()
        if flight.plan is not plan:
            raise RuntimeError("results must be handed over in the order of their plans")
        first, counts = outputs.tokens[:, 0].tolist(), outputs.n_valid.tolist()
        generations = plan.generations.tolist()
        bad = set(outputs.not_finite.nonzero()[0].tolist())
        for scored, arrays in zip(plan.scored, outputs.scored, strict=True):
            seq = flight.rows[scored.row]
            if not seq.ended and seq.generation == generations[scored.row]:
                start = int(plan.starts[scored.row])
                if not gather_scores(seq.group, start, scored.targets.tolist(), arrays):
                    bad.add(scored.row)
        if plan.num_decode < len(flight.rows):
            self._note_first_tokens(flight.rows[plan.num_decode :], counts[plan.num_decode :])
        receive_one, outbox, lone = self._receive_one, self._roster.outbox, 0
        pooled = pooled_rows(plan, outputs, bad)
        # Every row of every step passes here: what most of them are is looked for first.
        rows = zip(flight.rows, generations, flight.promised, counts, first, strict=True)
        for row, (seq, generation, promised, count, token) in enumerate(rows):
            if bad and row in bad:
                self._fail(seq, "its logits held an inf or NaN")
            elif seq.generation == generation and not seq.ended:
                seq.in_flight -= 1
                seq.unread -= promised
                if (
                    count == 1
                    and seq.plain
                    and token not in seq.stop_ids
                    and len(seq.tokens) < seq.limit
                ):
                    outbox.append(receive_one(seq, token))
                    lone += 1
                elif count:
                    tokens = outputs.tokens[row, :count].tolist()
                    self._receive(seq, tokens, row, outputs.logprobs)
                elif row in pooled:
                    self._roster.end(seq, FinishReason.STOP, embedding_of(seq, pooled[row]))
                elif promised and row >= plan.num_decode:
                    self._fail(seq, "its prompt gave no token")
        if self._roster.waiting.contended:
            self._roster.waiting.charge_rows(flight.rows, counts)
        self._meters.counters.output_tokens += lone
        self._meters.recompute.count(sum(counts[: plan.num_decode]), 0)
        if not self._roster.running:
            self._observe_waste()
        return self.take_outputs()

    def _note_first_tokens(self, prompt_rows: list[Sequence], counts: list[int]) -> None:
        """A first token comes with the row that ends a prompt."""
        now = self._clock()
        for seq, count in zip(prompt_rows, counts, strict=True):
            if count and seq.group.first_token is None:
                seq.group.first_token = now

    def _receive_one(self, seq: Sequence, token: int) -> RequestOutput:
        """`_receive` of what nearly every row brings: a token that ends nothing, and no more."""
        tokens, kv = seq.tokens, seq.kv
        tokens.append(token)
        if len(tokens) > kv.index_at:
            self._cache.register(kv, tokens, len(tokens) - 1)
        return RequestOutput(seq.id, (token,), cached_tokens=seq.cached_tokens, choice=seq.choice)

    def _receive(
        self, seq: Sequence, tokens: list[int], row: int, arrays: LogprobArrays | None
    ) -> None:
        """New tokens of one sequence."""
        reason = accept(seq, tokens)
        self._meters.counters.output_tokens += len(tokens)
        # All but the last token are known to be part of the answer and have their KV.
        if len(seq.tokens) > seq.kv.index_at:
            self._cache.register(seq.kv, seq.tokens, len(seq.tokens) - 1)
        output = RequestOutput(
            seq.id, tuple(tokens), cached_tokens=seq.cached_tokens, choice=seq.choice
        )
        if arrays is not None and seq.alternatives is not None:
            output.logprobs = logprobs_of(arrays, row, tokens, seq.alternatives)
        if seq.group.scores_due and not seq.choice:
            output.prompt_logprobs = seq.group.take_scores()
        if reason is None:
            self._roster.outbox.append(output)
        else:
            self._roster.end(seq, reason, output)

    def _fail(self, seq: Sequence, why: str) -> None:
        """Ends one request whose results are bad, and lets nobody find its KV.

        Also when it ended meanwhile: others must not come upon what it left in the index.
        """
        self._cache.forget(seq.kv)
        if not seq.ended:
            self._end_with(seq.group, Internal(f"request {seq.id!r}: {why}"))

    def _end_with(self, group: Group, error: QuireError) -> None:
        self._roster.end_request(group, FinishReason.ERROR, error)

    def requeue_all(self, fault: Exception) -> None:
        """The device lost its state: who ran starts over once; the second time it ends."""
        self._meters.counters.failed_steps += 1
        self._flights.clear()
        for seq in tuple(self._roster.running):
            if seq.ended:  # with another choice of its request
                continue
            if seq.requeues:
                why = "a device step failed for the second time; the engine's log says why"
                error = Internal(f"request {seq.id!r}: {why}")
                error.__cause__ = fault
                self._end_with(seq.group, error)
            else:
                seq.requeues += 1
                # What was counted as computed: of decode rows, those whose tokens came.
                counted = min(seq.scheduled, max(seq.prefilled, len(seq.tokens) - 1))
                seq.recompute_until = max(seq.recompute_until, counted)
                self._roster.suspend(seq)
        self._cache.clear()

    def _expire(self) -> None:
        now = self._clock()
        for group in self._roster.overdue(now):
            most = group.max_tokens * group.request.sampling.choices
            why = (
                f"deadline: passed {now - by_deadline(group)[0]:.3f} s ago, after "
                f"{group.outputs} of at most {most} output tokens"
            )
            self._end_with(group, DeadlineExceeded(why))

    # ---- what is known about it all

    def check_integrity(self) -> None:
        """Proves that every page and slot is free, or held as often as it should be."""
        self._roster.check_integrity()

    def stats(self) -> EngineStats:
        """A snapshot; safe from any thread, because it only reads plain numbers."""
        return self._meters.stats(self._roster, self._cache)

    def _count_entry(self, seq: Sequence, hit: PrefixHit) -> None:
        """An admission, which counts once for all choices, however often they have to give way."""
        group = seq.group
        if group.cached_tokens < 0:
            group.cached_tokens = hit.tokens
            self._meters.enter(seq.prompt_len, hit.tokens)
            group.admitted = self._clock()
            group.tenant.last_wait = group.admitted - group.arrived
        seq.cached_tokens = group.cached_tokens

    def _observe_waste(self) -> None:
        """Full pages may be held by many; what is empty belongs to one alone."""
        waste = self._meters.waste
        if waste.due or not self._roster.running:
            empty = sum(seq.kv.capacity - seq.scheduled for seq in self._roster.running)
            allocated = self._cache.owned * self._cache.page_size
            waste.observe(allocated - empty, allocated)
