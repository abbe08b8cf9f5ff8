"""Plays a scheduler against the fake runner, and keeps what each request got."""

from __future__ import annotations

from collections import deque

from fake_runner import FakeRunner, expected_answer

from quire.model.plan import RunnerSpec, StepPlan
from quire.sched.limits import resolve_max_tokens
from quire.sched.request import Request, RequestOutput
from quire.sched.scheduler import Scheduler


class Driver:
    """schedule, launch, collect, update; `depth` steps stay in flight while the next is planned."""

    def __init__(self, spec: RunnerSpec, *, depth: int = 0, **settings: object):
        self.now = 0.0
        self.spec = spec
        self.depth = depth
        self.runner = FakeRunner(spec)
        settings = {"max_batched_tokens": 32, "prefill_chunk": 32, **settings}
        self.scheduler = Scheduler(spec, clock=lambda: self.now, **settings)  # type: ignore
        self.flights: deque = deque()
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestOutput] = {}  # of choice 0, or of the request by an error
        self.choices: dict[tuple[str, int], list[int]] = {}
        self.choice_ends: dict[tuple[str, int], RequestOutput] = {}
        self.ended: set[str] = set()
        self.scores: dict[str, list[float | None]] = {}
        self.plans: list[StepPlan] = []

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.submit(request)

    def launch(self) -> StepPlan | None:
        """Plans and launches, and reads nothing."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.flights.append((plan, self.runner.launch(plan)))
            self.plans.append(plan)
        self.scheduler.check_integrity()
        return plan

    def collect(self) -> None:
        """Reads the oldest step in flight."""
        plan, handle = self.flights.popleft()
        self.hear(self.scheduler.update(plan, self.runner.collect(handle)))
        self.scheduler.check_integrity()

    def step(self) -> StepPlan | None:
        plan = self.launch()
        if len(self.flights) > (self.depth if plan is not None else 0):
            self.collect()
        self.hear(self.scheduler.take_outputs())
        return plan

    def run(self, limit: int = 500) -> Driver:
        """To the end of all requests."""
        for _ in range(limit):
            if not self.flights and not self.scheduler.unfinished:
                self.hear(self.scheduler.take_outputs())
                return self
            self.step()
        raise AssertionError("requests are left")

    def hear(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            id, key = output.request_id, (output.request_id, output.choice)
            assert id not in self.ended and key not in self.choice_ends, "an output after the last"
            self.choices.setdefault(key, []).extend(output.tokens)
            if output.choice == 0:
                self.tokens[id] = self.choices[key]
            if output.prompt_logprobs is not None:
                assert id not in self.scores and output.choice == 0
                self.scores[id] = [entry and entry.logprob for entry in output.prompt_logprobs]
            if output.finish_reason is not None:
                self.choice_ends[key] = output
                if output.choice == 0 or output.error:
                    self.ends[id] = output
            if output.ended:
                self.ended.add(id)

    def seq(self, id: str, choice: int = 0):
        """A choice that has begun and not ended."""
        group = self.scheduler._roster.get(id)
        return None if group is None else group.sequences[choice]

    def preempt(self, id: str, choice: int = 0) -> None:
        """As when pages run short."""
        self.scheduler._planner.pressure.preempt(self.seq(id, choice))

    def answer(self, request: Request, choice: int = 0) -> list[int]:
        limit = resolve_max_tokens(request, self.spec)
        return expected_answer(request, self.spec.vocab_size, limit, choice)[0]
