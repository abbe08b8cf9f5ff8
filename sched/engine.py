"""The engine: one thread that schedules, launches, and collects.

    any thread ──submit/finish──> inbox ─┐
                                         v
    loop:  schedule() ──plan N──> runner.launch
           runner.collect(N-1) ──> update() ──> on_outputs

While the device runs step N, the host takes in step N-1 and plans N+1, not before it must
(pacing.py). The thread owns the scheduler and the runner; other threads touch the inbox, under one
lock, and nothing else.

Every accepted request ends with exactly one output that says `ended`, also when the engine stops or
dies. A request that the scheduler cannot take on, plan for, or take results in for ends alone. A
step that fails, on the device or in the scheduler, costs the device's state: running requests start
over once. What fails again before a step could be planned cannot be repaired: then all requests end
with Internal.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from ..errors import Internal, QuireError, Unavailable, invalid
from ..model.plan import Runner, StepHandle, StepOutputs, StepPlan
from .limits import check_reason
from .pacing import Pacing
from .quota import Limits, Quotas
from .request import Ended, FinishReason, Request, RequestOutput, Timing
from .roster import our_fault
from .scheduler import Scheduler
from .stats import EngineStats, StepTimes

log = logging.getLogger(__name__)

IDLE_BEFORE_CHECK = 0.5
"""Seconds without work before the engine checks itself, so that the check delays nobody."""

JOIN_GRACE = 5.0
"""Seconds that a stop which may not wait still gives the step in progress."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A request, and when it came, in seconds."""

    request: Request
    at: float


@dataclass(frozen=True, slots=True)
class _Finish:
    """As `Engine.finish` was told."""

    request_id: str
    reason: FinishReason
    choice: int | None


@dataclass(frozen=True, slots=True)
class _Weights:
    """Shares of the tenants from now on."""

    of: Mapping[str, float]


class State(Enum):
    OPEN = "open"
    DRAINING = "draining"
    """Takes no new requests, and stops when those it has are done."""
    CLOSED = "closed"


class Engine:
    """Serves requests until it is stopped.

    Either call `start`, and the engine runs in a thread of its own; or call `step` until
    `has_work` is false, from one thread.

    Args:
      runner: where steps run.
      scheduler: decides which; owned by the engine from now on.
      overlap: launch a step before the results of the last are read.
      on_outputs: gets what a step gave, once per step, from the engine's thread; must not block.
      quotas: of the tenants.
      idle_before_check: seconds without work before the engine checks itself.
      pacing: says when to plan.

    Attributes:
      runner_call: when (time.monotonic() seconds) the runner was called that has not come back, and
        with which step; with None to make its state anew. None while it does nothing for the
        engine's thread.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        overlap: bool,
        on_outputs: Callable[[list[RequestOutput]], None],
        quotas: Quotas | None = None,
        idle_before_check: float = IDLE_BEFORE_CHECK,
        pacing: Pacing | None = None,
    ):
        self._runner = runner
        self._quotas = quotas or Quotas(time.monotonic)
        self._scheduler = scheduler
        self._on_outputs = on_outputs
        self._idle_before_check = idle_before_check
        self._pacing = pacing or Pacing()
        self._ahead = 1 if overlap else 0  # steps left in flight after a launch
        self._flights: deque[tuple[StepPlan, StepHandle, float]] = deque()  # and when launched
        self._collected = 0.0  # when the last step was
        self._step_times = StepTimes()
        self._planless = False  # a step failed, and none could be planned since
        self.runner_call: tuple[float, StepPlan | None] | None = None
        self._thread: threading.Thread | None = None

        self._wake = threading.Condition()  # guards what follows
        self._state = State.OPEN
        self._why_closed = "the engine was stopped"
        self._inbox: list[_Arrival | _Finish | _Weights] = []
        self._pending: Counter[str] = Counter()  # requests in the inbox, by tenant
        self._live: set[str] = set()  # accepted, and not told yet that they ended

    # ---- any thread

    def start(self) -> None:
        """Runs the loop in a thread."""
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        self._thread = threading.Thread(target=self._run, name="quire-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Accepts a request, or raises InvalidRequest, Overloaded or Unavailable."""
        self._scheduler.validate(request)
        with self._wake:
            if self._state is not State.OPEN:
                raise Unavailable(f"request {request.id!r}: {self._why_closed}")
            if request.id in self._live:
                raise invalid("id", request.id, "unlike that of every unfinished request")
            pending = self._pending
            self._scheduler.check_queue(request.tenant, pending.total(), pending[request.tenant])
            self._quotas.accept(request)
            self._live.add(request.id)
            self._inbox.append(_Arrival(request, self._scheduler.now()))
            pending[request.tenant] += 1
            self._wake.notify_all()

    def limit_tenants(self, table: Mapping[str, Limits]) -> None:
        """What each tenant may ask for from now on, and its share when others ask too. Before this
        is called nobody is limited; after it, who is not named gets Unavailable."""
        self._quotas.update(table)
        with self._wake:
            self._inbox.append(_Weights({name: limits.weight for name, limits in table.items()}))
            self._wake.notify_all()

    def finish(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        choice: int | None = None,
    ) -> None:
        """Ends a request early, or one of its choices; does nothing if that ended already."""
        check_reason(reason)
        with self._wake:
            if request_id in self._live:
                self._inbox.append(_Finish(request_id, reason, choice))
                self._wake.notify_all()

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, and returns when the loop has ended.

        Args:
          drain: let accepted requests run to their end; else they end with Unavailable.
          timeout: seconds to drain at most.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._wake:
            if self._state is State.OPEN:
                self._state = State.DRAINING
                self._why_closed = "the engine is stopping"
        if drain:
            self._drain(deadline)
        self._close("the engine was stopped")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_GRACE)
        self._abandon(Unavailable, self._why_closed)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    @property
    def step_times(self) -> StepTimes:
        """How long steps took, each from when the device could begin with it (it was launched, and
        the one before collected) until its results were read."""
        return self._step_times

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return self._state is State.OPEN

    @property
    def has_work(self) -> bool:
        return bool(self._inbox or self._flights or self._scheduler.unfinished)

    # ---- the engine's thread

    def step(self) -> None:
        """One round of the loop. Never raises: what cannot be repaired closes the engine."""
        try:
            outputs: list[RequestOutput] = []
            try:
                self._wait_for_arrivals()
                begun = self._scheduler.now()
                self._take_inbox(outputs)
                plan = self._schedule()
                self._launch(plan)
                if plan is not None:
                    self._pacing.planned(self._scheduler.now() - begun)
                results = self._collect(ahead=self._ahead if plan is not None else 0)
                if results:
                    outputs += self._scheduler.update(*results)
            except Exception as fault:
                self._recover(fault)
            outputs += self._scheduler.take_outputs()
            self._deliver(outputs)
        except Exception as fault:
            self._die(fault)

    def _wait_for_arrivals(self) -> None:
        """Plans no sooner than the step in flight asks for: who comes meanwhile is in the next."""
        if not self._flights or self._scheduler.waiting:
            return
        plan, _, launched = self._flights[0]
        begun = max(launched, self._collected)
        now = self._scheduler.now()
        if (seconds := self._pacing.wait(plan.bucket, plan.num_rows, begun, now)) > 0:
            with self._wake:
                self._wake.wait_for(lambda: self._state is State.CLOSED, seconds)

    def _schedule(self) -> StepPlan | None:
        plan = self._scheduler.schedule()
        if plan is None and not self._flights and self._scheduler.unfinished:
            raise RuntimeError("the scheduler made no progress")
        self._planless = False
        return plan

    def _launch(self, plan: StepPlan | None) -> None:
        if plan is not None:
            self.runner_call = time.monotonic(), plan
            handle = self._runner.launch(plan)
            self.runner_call = None
            self._flights.append((plan, handle, self._scheduler.now()))

    def _collect(self, ahead: int) -> tuple[StepPlan, StepOutputs] | None:
        """Reads the oldest step in flight, unless the host may run ahead of it."""
        if len(self._flights) <= ahead:
            return None
        plan, handle, launched = self._flights.popleft()
        asked = self._scheduler.now()
        self.runner_call = time.monotonic(), plan
        outputs = self._runner.collect(handle)
        self.runner_call = None
        now = self._scheduler.now()
        took = now - max(launched, self._collected)
        self._step_times.count(plan, took)
        if ahead:
            self._pacing.took(plan.bucket, took, now - asked)
        self._collected = now
        return plan, outputs

    def _recover(self, fault: Exception) -> None:
        if self._planless:
            raise fault
        self._planless = True
        log.error("a step failed; running requests start over", exc_info=fault)
        self._flights.clear()
        # Frames of the call that failed hold the KV, and the new ones may not fit beside it.
        traceback.clear_frames(fault.__traceback__)
        self.runner_call = time.monotonic(), None
        self._runner.reset()
        self.runner_call = None
        self._scheduler.requeue_all(fault)

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self.step()
        except Exception as fault:
            self._die(fault)
        self._close("the engine was stopped")
        self._abandon(Unavailable, self._why_closed)

    def _wait_for_work(self) -> bool:
        """Blocks while there is nothing to do; False when the loop shall end.

        Deadlines need no alarm here: a request that could miss one is work.
        """
        with self._wake:
            checked = False
            while not self.has_work:
                if self._state is not State.OPEN:
                    return False
                woken = self._wake.wait(None if checked else self._idle_before_check)
                if not woken:
                    self._scheduler.check_integrity()
                    checked = True
            return self._state is not State.CLOSED

    def _take_inbox(self, outputs: list[RequestOutput]) -> None:
        """Adds the ends of requests that could not be taken on; all others go on. Raises, with the
        inbox empty, what came up for one that was to end and was not its fault alone."""
        untaken: list[tuple[_Arrival, Exception]] = []
        uncertain: Exception | None = None
        if not self._inbox:
            return
        with self._wake:
            for message in self._inbox:
                match message:
                    case _Arrival(request, at):
                        self._pacing.came(at)
                        try:
                            self._scheduler.add(request, at)
                        except Exception as fault:
                            untaken.append((message, fault))
                    case _Finish(request_id, reason, choice):
                        try:
                            self._scheduler.finish(request_id, reason, choice)
                        except Exception as fault:
                            uncertain = fault
                    case _Weights(of):
                        self._scheduler.set_weights(of)
            self._inbox.clear()
            self._pending.clear()
        outputs += [self._not_taken(arrival, fault) for arrival, fault in untaken]
        if uncertain is not None:
            raise uncertain

    def _not_taken(self, arrival: _Arrival, fault: Exception) -> RequestOutput:
        """The end of a request that the scheduler refused to know; the fault is ours."""
        request = arrival.request
        log.error("request %r could not be taken on and ends", request.id, exc_info=fault)
        error = our_fault(request.id, fault)
        now = self._scheduler.now()
        return RequestOutput(
            request.id,
            finish_reason=FinishReason.ERROR,
            error=error,
            ended=True,
            timing=Timing(now - arrival.at, 0.0, 0.0),
            account=Ended(request, (), 0, now),
        )

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if not outputs:
            return
        self._quotas.observe(outputs)
        ended = [output.request_id for output in outputs if output.ended]
        with self._wake:
            if self._state is State.CLOSED:
                return  # whoever closed it tells those who are still live
            self._live.difference_update(ended)
        self._on_outputs(outputs)

    # ---- the end

    def _drain(self, deadline: float | None) -> None:
        """Waits until the accepted requests are done, or the deadline has passed."""
        if self._thread is not None:
            with self._wake:
                self._wake.notify_all()
            self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            return
        while self.has_work and self._state is not State.CLOSED:
            if deadline is not None and time.monotonic() >= deadline:
                return
            self.step()

    def _close(self, why: str) -> None:
        with self._wake:
            if self._state is not State.CLOSED:
                self._state = State.CLOSED
                self._why_closed = why
            self._wake.notify_all()

    def _die(self, fault: Exception) -> None:
        log.critical("the engine failed and closes", exc_info=fault)
        why = "the engine failed; its log says why"  # callers elsewhere need not read our faults
        self._close(why)
        self._abandon(Internal, why, fault)

    def _abandon(
        self, kind: type[QuireError], why: str, cause: BaseException | None = None
    ) -> None:
        """Tells all who still wait for an end that this is it."""
        with self._wake:
            ended = sorted(self._live)
            self._live.clear()
            self._inbox.clear()
            self._pending.clear()
        if not ended:
            return
        try:
            outputs = []
            for id in ended:
                error = kind(f"request {id!r}: {why}")
                error.__cause__ = cause
                reason = FinishReason.ERROR
                outputs.append(RequestOutput(id, finish_reason=reason, error=error, ended=True))
            self._on_outputs(outputs)
        except Exception:
            log.exception("outputs could not be handed over while closing")
