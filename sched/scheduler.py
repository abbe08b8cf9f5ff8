"""Which tokens run next. Called by the engine's loop, from one thread.

    submit(), finish()         requests come and go               arrivals.py, roster.py
    schedule() -> StepPlan     who runs in the next step          planner.py, pressure.py
    update(plan, outputs)      what a step gave, one step late    results.py

Owns the sequences (through Roster), the pages (through KVCache) and the plans in flight, and makes
the parts that work on them: data goes from arrivals to planner to results, and none of these knows
another. Whatever ends a request does so through Roster.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from ..errors import DeadlineExceeded, Internal
from ..kv.cache import KVCache
from ..model.plan import RunnerSpec, StepOutputs, StepPlan
from .arrivals import Arrivals
from .limits import check_reason, check_request
from .plan_builder import Flight
from .planner import Planner
from .request import FinishReason, Request, RequestOutput
from .results import Results
from .roster import Roster, by_deadline
from .stats import EngineStats, Meters


class Scheduler:
    """Continuous batching with chunked prompts, prefix sharing and preemption by recompute.

    Args:
      spec: the runner's sizes.
      max_batched_tokens: tokens in one step at most.
      prefill_chunk: tokens of one prompt in one step at most.
      prefix_caching: share the KV of equal prompt prefixes.
      max_queue: requests that may wait before more are refused, where one tenant asks; several
        share twice the room, see arrivals.py.
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
        self._clock = clock
        self._meters = Meters(clock)
        self._cache = KVCache(spec.num_pages, spec.page_size, prefix_caching=prefix_caching)
        self._roster = Roster(spec.num_slots, self._cache, clock)
        self._arrivals = Arrivals(spec, self._roster, self._cache, max_queue, clock)
        self._planner = Planner(
            spec,
            self._roster,
            self._cache,
            self._meters,
            clock,
            max_batched_tokens=max_batched_tokens,
            prefill_chunk=prefill_chunk,
        )
        self._results = Results(self._roster, self._cache, self._meters, clock)
        self._flights: deque[Flight] = deque()  # planned, results not read; oldest first

    # ---- requests come and go

    def now(self) -> float:
        """Seconds, on the scale of Request.deadline."""
        return self._clock()

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._roster)

    @property
    def waiting(self) -> bool:
        """Whether anybody is queued who does not run yet."""
        return bool(self._roster.waiting)

    def validate(self, request: Request) -> None:
        """Raises InvalidRequest if this request can never be served. Safe from any thread."""
        check_request(request, self._spec)

    def check_queue(self, tenant: str = "", pending: int = 0, pending_of_tenant: int = 0) -> None:
        """Raises Overloaded if a tenant has its part of the queue, with what is pending to come.
        Safe from any thread, see arrivals.py."""
        self._arrivals.check_queue(tenant, pending, pending_of_tenant)

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
        self._arrivals.add(request, arrived)

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

        Idempotent. Raises as `update` does.
        """
        check_reason(reason)
        group = self._roster.get(request_id)
        if group is None:
            return
        try:
            if choice is None:
                self._roster.end_request(group, reason)
            elif choice in group.open and choice < len(group.sequences):
                self._roster.end(group.sequences[choice], reason)
        except Exception as fault:
            self._roster.fail(group, "ended", fault)
            self.check_integrity()

    def take_outputs(self) -> list[RequestOutput]:
        """What became of requests since this was last called, in order."""
        outputs, self._roster.outbox = self._roster.outbox, []
        return outputs

    # ---- steps

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before results arrive.

        A request that cannot be planned for ends alone. Where a fault is nobody's, or left pages or
        slots uncertain, it is raised: `requeue_all` is what helps then, as for `update`.
        """
        self._expire()
        flight = self._plan()
        self._meters.look_at_pages(self._roster, self._cache)
        if flight is None:
            return None
        self._flights.append(flight)
        self._meters.depart(flight.plan)
        return flight.plan

    def _plan(self) -> Flight | None:
        while True:
            flight = self._planner.plan()
            if self._planner.failed is None:
                return flight
            seq, fault = self._planner.failed
            # Not while the step was planned: a row of it may be part, and names its slot.
            self._roster.fail(seq.group, "planned for", fault)
            self.check_integrity()
            if flight is not None:
                return flight

    def update(self, plan: StepPlan, outputs: StepOutputs) -> list[RequestOutput]:
        """Takes in what the oldest launched step gave; returns all outputs since the last call."""
        flight = self._flights.popleft()
        if flight.plan is not plan:
            raise RuntimeError("results must be handed over in the order of their plans")
        self._results.take_in(flight, outputs)
        if not self._roster.running:
            self._meters.look_at_pages(self._roster, self._cache)
        return self.take_outputs()

    def requeue_all(self, fault: Exception) -> None:
        """A step failed and the device lost its state: who ran starts over once; the second time it
        ends."""
        self._meters.counters.failed_steps += 1
        self._flights.clear()
        ran = tuple(self._roster.running)
        for seq in ran:
            seq.requeues += 1
            # What was counted as computed: of decode rows, those whose tokens came.
            counted = min(seq.scheduled, max(seq.prefilled, len(seq.tokens) - 1))
            seq.recompute_until = max(seq.recompute_until, counted)
        self._roster.restart(fault)
        for seq in ran:
            if seq.requeues > 1 and not seq.ended:  # not with another choice of its request
                why = "a step failed for the second time; the engine's log says why"
                error = Internal(f"request {seq.id!r}: {why}")
                error.__cause__ = fault
                self._roster.end_request(seq.group, FinishReason.ERROR, error)
        self.check_integrity()

    def _expire(self) -> None:
        now = self._clock()
        for group in self._roster.overdue(now):
            try:
                most = group.max_tokens * group.request.sampling.choices
                why = (
                    f"deadline: passed {now - by_deadline(group)[0]:.3f} s ago, after "
                    f"{group.outputs} of at most {most} output tokens"
                )
                self._roster.end_request(group, FinishReason.ERROR, DeadlineExceeded(why))
            except Exception as fault:
                self._roster.fail(group, "ended", fault)
                self.check_integrity()

    # ---- what is known about it all

    def check_integrity(self) -> None:
        """Proves that every page and slot is free, or held as often as it should be."""
        self._roster.check_integrity()

    def stats(self) -> EngineStats:
        """A snapshot; safe from any thread, because it only reads plain numbers."""
        return self._meters.stats(self._roster, self._cache)
