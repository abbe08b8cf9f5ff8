"""Which tokens run next. Called by the engine's loop, from one thread.

    submit(), finish()         requests come and go
    schedule() -> StepPlan     who runs in the next step, with which pages
    update(plan, outputs)      what a step gave, one step late

Owns the sequences (through Roster), the pages (through KVCache) and the plans in flight. A plan may
be made before the results of the last one are known; what is known of a running row's position is
then an upper bound, and pages are granted by it.

Progress is certain: `schedule` goes through the running sequences in order of service and takes
pages from the end of that order, so the first one runs, or waits for results that are on their way.
`schedule` returns None only when nothing can be done before results arrive.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ..errors import DeadlineExceeded, Internal, Overloaded
from ..kv.accounting import PrefixCounters, RecomputeMeter, WasteMeter
from ..kv.cache import KVCache, PrefixHit
from ..model.plan import LogprobArrays, RunnerSpec, StepOutputs, StepPlan
from . import policy
from .limits import check_reason, check_request, resolve_max_tokens
from .plan_builder import Flight, StepBuilder
from .request import FinishReason, Request, RequestOutput
from .results import accept, logprobs_of
from .roster import Roster
from .sequence import Sequence
from .stats import Counters, EngineStats

MAX_RETRY_AFTER = 60.0
"""Seconds; the longest hint given to a caller who found the queue full."""


class Scheduler:
    """Continuous batching with chunked prompts, prefix sharing and preemption by recompute.

    Args:
      spec: the runner's sizes.
      max_batched_tokens: tokens in one step at most.
      prefill_chunk: tokens of one prompt in one step at most.
      prefix_caching: share the KV of equal prompt prefixes.
      max_queue: requests that may wait before more are refused.
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
        self._roster = Roster(spec.num_slots, self._cache)
        self._flights: deque[Flight] = deque()  # planned, results not read; oldest first
        self._resting: Sequence | None = None  # sits out this step, so as to give way in the next
        self._arrivals = 0
        self._last_wait = 0.0  # seconds the latest admission had waited

        self._counters = Counters()
        self._prefix = PrefixCounters()
        self._recompute = RecomputeMeter()
        self._waste = WasteMeter(clock)

    # ---- requests come and go

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._roster)

    def validate(self, request: Request) -> None:
        """Raises InvalidRequest if this request can never be served. Safe from any thread."""
        check_request(request, self._spec)

    def check_queue(self, pending: int = 0) -> None:
        """Raises Overloaded if the queue, with `pending` more to come, is full.

        Safe from any thread: behind the back of whoever submits, the queue only gets shorter, or
        longer by preemption, which may go above the limit anyway.
        """
        waiting = len(self._roster.waiting) + pending
        if waiting >= self._max_queue:
            hint = min(max(self._last_wait, 1.0), MAX_RETRY_AFTER)
            raise Overloaded(
                f"queue: {waiting} requests wait, at most {self._max_queue} may; "
                f"retry in {hint:.0f} s",
                retry_after=hint,
            )

    def submit(self, request: Request) -> None:
        """Queues a request, or says why not (InvalidRequest, Overloaded)."""
        self.validate(request)
        self.check_queue()
        self.add(request)

    def add(self, request: Request) -> None:
        """Queues a request that `validate` and `check_queue` let pass."""
        self._roster.add(
            Sequence(
                request=request,
                arrival=self._arrivals,
                submitted=self._clock(),
                max_tokens=resolve_max_tokens(request, self._spec),
                chain=self._cache.chain(request.adapter, request.tenant, request.cache_salt),
            )
        )
        self._arrivals += 1

    def finish(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a request early: the caller left, or found a stop string. Idempotent."""
        check_reason(reason)
        seq = self._roster.get(request_id)
        if seq is not None:
            self._roster.end(seq, reason)

    def take_outputs(self) -> list[RequestOutput]:
        """What became of requests since this was last called, in order."""
        outputs, self._roster.outbox = self._roster.outbox, []
        return outputs

    # ---- a step is planned

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before results arrive."""
        self._expire()
        step = StepBuilder(self._decode_tokens())
        room = self._plan_running(step)
        self._admit(step, room)
        self._observe_waste()
        return self._depart(step.build(self._spec.ladder)) if step.rows else None

    def _decode_tokens(self) -> int:
        roster = self._roster
        return policy.decode_tokens(
            self._spec.max_k,
            len(roster.running),
            len(roster.prefilling),
            len(roster.waiting),
            self._cache,
        )

    def _plan_running(self, step: StepBuilder) -> int:
        """Rows for those who run already; returns the tokens left for newcomers.

        One pass in order of service, so that who gives way is not yet part of the step.
        """
        running, prefilling = self._roster.running, self._roster.prefilling
        k, rows_left = step.k, self._max_rows
        prompt_room = self._max_tokens - (len(running) - len(prefilling))
        self._resting = None
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
            # At the limit, its last token is on the way; should fewer arrive, it runs again.
            if start >= seq.limit or not rows_left:
                continue
            end = min(start + k, seq.limit)
            if end <= seq.kv.capacity or self._grow(step, seq, end):
                step.decode(seq, start)
                rows_left -= 1
        return prompt_room

    def _plan_prompt(self, step: StepBuilder, seq: Sequence, room: int) -> int:
        """The next chunk of a prompt, if there are pages for it; returns the tokens taken."""
        start = seq.prefilled
        end = min(start + self._prefill_chunk, start + room, seq.target)
        if end > seq.kv.capacity and not self._grow(step, seq, end):
            return 0
        step.prompt(seq, start, end)
        seq.prefilled = end
        if end == seq.target:
            self._roster.prefilling.discard(seq)
        # Others may share these pages at once, even within this step: the device runs plans in
        # order, and in each layer it writes all K/V of a step before it reads any.
        if end >= seq.kv.index_at:
            self._cache.register(seq.kv, seq.tokens, end)
        again = max(0, min(end, seq.recompute_until) - start)
        self._recompute.count(end - start - again, again)
        return end - start

    def _admit(self, step: StepBuilder, room: int) -> None:
        """Slots, pages and first chunks for those who wait, strictly in order of service."""
        roster, cache = self._roster, self._cache
        while room > 0 and roster.waiting and roster.slot_free and step.rows < self._max_rows:
            seq = roster.waiting.first
            hit = cache.match(seq.chain, seq.tokens)
            worst = self._recompute.ratio > policy.MAX_RECOMPUTE_RATIO
            reserved = policy.reserved_pages(
                roster.running, roster.prefilling, cache, worst_case=worst
            )
            if not policy.may_enter(seq, hit, reserved, cache, worst_case=worst):
                return
            roster.enter(seq, hit)
            step.init(seq)
            step.pages(seq.slot, 0, seq.kv.pages)
            self._count_entry(seq, hit)
            room -= self._plan_prompt(step, seq, room)

    def _grow(self, step: StepBuilder, seq: Sequence, positions: int) -> bool:
        """Pages for `positions` of a sequence, taken from the last in order if need be.

        False: it sits this step out. Either it is the last itself, and keeps what it has until
        somebody needs it; or results of the last are on their way, and are read before it gives
        way: it rests now, so that none will be on their way in the next step.
        """
        while (added := self._cache.grow(seq.kv, positions)) is None:
            victim = self._roster.running.last
            if victim is seq:
                return False
            if victim.in_flight:
                self._resting = victim
                return False
            self._preempt(victim)
        step.pages(seq.slot, len(seq.kv.pages) - len(added), added)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Takes pages and slot; what was computed is computed again, or found in the index."""
        self._counters.preemptions += 1
        seq.recompute_until = max(seq.recompute_until, seq.scheduled)
        self._roster.suspend(seq)

    def _depart(self, flight: Flight) -> StepPlan:
        """Counts a step that is about to be launched."""
        self._flights.append(flight)
        self._counters.steps += 1
        self._counters.real_tokens += flight.plan.num_tokens
        self._counters.padded_tokens += flight.plan.bucket.tokens
        return flight.plan

    # ---- its results arrive

    def update(self, plan: StepPlan, outputs: StepOutputs) -> list[RequestOutput]:
        """Takes in what the oldest launched step gave; returns all outputs since the last call."""
        flight = self._flights.popleft()
        if flight.plan is not plan:
            raise RuntimeError("results must be handed over in the order of their plans")
        sampled, counts = outputs.tokens.tolist(), outputs.n_valid.tolist()
        generations = plan.generations.tolist()
        bad = set(outputs.not_finite.nonzero()[0].tolist())
        for row, seq in enumerate(flight.rows):
            count = counts[row]
            if row in bad:
                self._fail(seq, "its logits held an inf or NaN")
            elif not seq.ended and seq.generation == generations[row]:
                seq.in_flight -= 1
                seq.unread -= flight.promised[row]
                if count:
                    self._receive(seq, sampled[row][:count], row, outputs.logprobs)
                elif flight.promised[row] and row >= plan.num_decode:
                    self._fail(seq, "its prompt gave no token")
        self._recompute.count(sum(counts[: plan.num_decode]), 0)
        self._observe_waste()
        return self.take_outputs()

    def _receive(
        self, seq: Sequence, tokens: list[int], row: int, arrays: LogprobArrays | None
    ) -> None:
        """New tokens of one sequence."""
        reason = accept(seq, tokens)
        self._counters.output_tokens += len(tokens)
        # All but the last token are known to be part of the answer and have their KV.
        if len(seq.tokens) > seq.kv.index_at:
            self._cache.register(seq.kv, seq.tokens, len(seq.tokens) - 1)
        logprobs = None
        if arrays is not None and seq.request.sampling.logprobs is not None:
            logprobs = logprobs_of(arrays, row, tokens, seq.request.sampling.logprobs)
        if reason is None:
            self._roster.outbox.append(
                RequestOutput(
                    seq.id, tuple(tokens), logprobs, cached_tokens=max(0, seq.cached_tokens)
                )
            )
        else:
            self._roster.end(seq, reason, tokens=tuple(tokens), logprobs=logprobs)

    def _fail(self, seq: Sequence, why: str) -> None:
        """Ends one request whose results are bad, and lets nobody find its KV.

        Also when it ended meanwhile: others must not come upon what it left in the index.
        """
        self._cache.forget(seq.kv)
        if not seq.ended:
            error = Internal(f"request {seq.id!r}: {why}")
            self._roster.end(seq, FinishReason.ERROR, error=error)

    def requeue_all(self, fault: Exception) -> None:
        """The device lost its state: who ran starts over once; the second time it ends."""
        self._counters.failed_steps += 1
        self._flights.clear()
        for seq in tuple(self._roster.running):
            if seq.requeues:
                error = Internal(
                    f"request {seq.id!r}: a device step failed for the second time: {fault}"
                )
                self._roster.end(seq, FinishReason.ERROR, error=error)
            else:
                seq.requeues += 1
                self._roster.suspend(seq)
        self._cache.clear()

    def _expire(self) -> None:
        now = self._clock()
        for seq in self._roster.overdue(now):
            error = DeadlineExceeded(
                f"deadline: passed {now - policy.by_deadline(seq)[0]:.3f} s ago, after "
                f"{seq.outputs} of at most {seq.max_tokens} output tokens"
            )
            self._roster.end(seq, FinishReason.ERROR, error=error)

    # ---- what is known about it all

    def check_integrity(self) -> None:
        """Proves that every page and slot is free, or held as often as it should be."""
        self._roster.check_integrity()

    def stats(self) -> EngineStats:
        """A snapshot; safe from any thread, because it only reads plain numbers."""
        counters, recompute, cache = self._counters, self._recompute, self._cache
        return EngineStats(
            running=len(self._roster.running),
            waiting=len(self._roster.waiting),
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            finished=self._roster.finished,
            preemptions=counters.preemptions,
            failed_steps=counters.failed_steps,
            prefix_queried_tokens=self._prefix.queried_tokens,
            prefix_hit_tokens=self._prefix.hit_tokens,
            pages_total=cache.total,
            pages_used=cache.owned,
            pages_cached=cache.cached,
            waste=self._waste.waste,
            real_tokens=counters.real_tokens,
            padded_tokens=counters.padded_tokens,
            useful_tokens=recompute.useful,
            recomputed_tokens=recompute.recomputed,
            recompute_ratio=recompute.ratio,
        )

    def _count_entry(self, seq: Sequence, hit: PrefixHit) -> None:
        """An admission, which counts once however often the request has to give way."""
        if seq.cached_tokens >= 0:
            return
        seq.cached_tokens = hit.tokens
        self._prefix.count(seq.prompt_len, hit.tokens)
        self._counters.prompt_tokens += seq.prompt_len
        self._last_wait = self._clock() - seq.submitted

    def _observe_waste(self) -> None:
        """Full pages may be held by many; what is empty belongs to one alone."""
        if self._waste.due or not self._roster.running:
            empty = sum(seq.kv.capacity - seq.scheduled for seq in self._roster.running)
            allocated = self._cache.owned * self._cache.page_size
            self._waste.observe(allocated - empty, allocated)
