"""Tenants in virtual time: what a scheduler does to the time to first token, without a device.

A step takes STEP_SECONDS and a little for each prompt token; the loop is the engine's with overlap:
step N + 1 is planned when step N begins. Callers come at random times, whatever becomes of those
before them (open loop), each for an answer of the same length.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fake_runner import make_request

from quire.errors import Overloaded
from quire.model.plan import StepPlan
from quire.sched.scheduler import Scheduler
from quire.tools.bench.null_runner import NullRunner, null_spec

STEP_SECONDS = 0.02
PROMPT_TOKEN_SECONDS = 2.5e-5
PROMPT = 100  # tokens


@dataclass
class Load:
    """Requests a second of each tenant, for so long."""

    rates: Mapping[str, float]
    seconds: float
    output: int
    seed: int = 0
    prompts: Mapping[str, int] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)

    def arrivals(self) -> Iterator[tuple[float, str]]:
        """Each tenant's are the same whatever the others do."""
        return heapq.merge(*(self._of(name) for name in self.rates))

    def _of(self, name: str) -> Iterator[tuple[float, str]]:
        """As many as the rate says, so that chance does not make somebody ask for more."""
        draw = random.Random(f"{name} {self.seed}")
        start = self.starts.get(name, 0.0)
        count = round(self.rates[name] * (self.seconds - start))
        for at in sorted(draw.uniform(start, self.seconds) for _ in range(count)):
            yield at, name


@dataclass
class Seen:
    """What came of it, by tenant."""

    waits: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # to token 1
    tokens: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    recomputed: float = 0.0  # per useful token
    preemptions: int = 0
    busy: float = 0.0  # mean rows of a step

    def p95(self, *names: str) -> float:
        waits = sorted(wait for name in names for wait in self.waits[name])
        return waits[int(0.95 * len(waits))]


def capacity(slots: int, output: int, prompt: int = PROMPT) -> float:
    """Requests a second that so many slots can serve, without end."""
    seconds = output * STEP_SECONDS / slots + prompt * PROMPT_TOKEN_SECONDS
    return 1 / seconds


def simulate(
    load: Load,
    *,
    slots: int,
    pages: int | None = None,
    weights: Mapping[str, float] = {},
    max_queue: int = 64,
    warmup: float = 0.0,
    **settings: object,
) -> Seen:
    """Plays a load; waits are of those who came after the warm-up."""
    longest = max([PROMPT, *load.prompts.values()]) + load.output
    page_size = 32
    enough = 1 + slots * (longest // page_size + 2)
    spec = null_spec(slots, page_size=page_size, max_model_len=longest, pages=pages or enough)
    now = 0.0
    given = {"max_batched_tokens": 2048, "prefill_chunk": 2048, **settings}
    scheduler = Scheduler(spec, max_queue=max_queue, clock=lambda: now, **given)  # type: ignore
    scheduler.set_weights(weights)
    runner, seen = NullRunner(spec), Seen()
    flights: deque[tuple[StepPlan, float]] = deque()
    arrivals = deque(load.arrivals())
    came: dict[str, tuple[str, float]] = {}
    begun: set[str] = set()
    number = rows = steps = 0
    while arrivals:
        while arrivals and arrivals[0][0] <= now:
            at, name = arrivals.popleft()
            number += 1
            came[str(number)] = name, at
            prompt = (number % 50_000, *range(load.prompts.get(name, PROMPT) - 1))
            try:
                scheduler.submit(
                    make_request(str(number), prompt, load.output, tenant=name, ignore_eos=True)
                )
            except Overloaded:
                seen.refused[name] += 1
        plan = scheduler.schedule()
        if plan is not None:
            prompts = plan.num_tokens - plan.num_decode
            flights.append((plan, STEP_SECONDS + PROMPT_TOKEN_SECONDS * prompts))
            rows, steps = rows + plan.num_rows, steps + 1
        if len(flights) > (plan is not None) or (plan is None and flights):
            done, seconds = flights.popleft()
            now += seconds
            for output in scheduler.update(done, runner.collect(done)):
                name, at = came[output.request_id]
                seen.tokens[name] += len(output.tokens)
                if output.tokens and output.request_id not in begun:
                    begun.add(output.request_id)
                    if at >= warmup:
                        seen.waits[name].append(now - at)
        elif plan is None:
            now = max(now, arrivals[0][0])
    for name, at in came.values():
        assert name in load.rates and at < load.seconds
    stats = scheduler.stats()
    seen.recomputed = stats.recomputed_tokens / stats.useful_tokens
    seen.preemptions, seen.busy = stats.preemptions, rows / steps
    return seen
