"""Thousands of random traces through the scheduler, against a runner that checks everything.

Each trace mixes arrivals, priorities, tenants, shared prefixes, aborts, stops, deadlines, tiny page
pools, random chunking and budgets, a device that gives 0 to k tokens a row, and now and then
several choices, controls, log-probabilities of prompts and requests for embeddings. After every
step pages and slots must add up; at the end every choice of every request has ended once, with
exactly the tokens it would have got alone.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest
from fake_runner import (
    FakeRunner,
    expected_answer,
    expected_embedding,
    expected_scores,
    make_request,
    make_spec,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.errors import DeadlineExceeded
from quire.model.plan import Emit, StepPlan
from quire.sched.limits import context_limit, resolve_max_tokens
from quire.sched.request import FinishReason, Request, RequestOutput
from quire.sched.scheduler import Scheduler

VOCAB = 13


@dataclass(frozen=True)
class World:
    """What a trace is made of."""

    seed: int
    page_size: int
    pages: int
    slots: int
    max_k: int
    budget: int
    chunk: int
    depth: int  # steps in flight while the next is planned
    caching: bool
    requests: int
    interrupts: bool  # aborts, stops found by the text layer, deadlines
    tenants: int = 1  # with weights 1, 2, …


@dataclass
class Story:
    """What callers saw of one request."""

    request: Request
    tokens: list[list[int]]  # of each choice
    ends: list[RequestOutput | None]  # of each choice
    ended_by: list[FinishReason | None]  # each choice, by the caller
    ended: RequestOutput | None = None
    scores: list[float | None] | None = None

    @classmethod
    def of(cls, request: Request) -> Story:
        choices = request.sampling.choices
        return cls(request, [[] for _ in range(choices)], [None] * choices, [None] * choices)


worlds = st.builds(
    World,
    seed=st.integers(0, 2**32 - 1),
    page_size=st.sampled_from([1, 2, 4]),
    pages=st.integers(6, 30),
    slots=st.integers(1, 5),
    max_k=st.integers(1, 5),
    budget=st.integers(6, 24),
    chunk=st.integers(1, 24),
    depth=st.integers(0, 2),
    caching=st.booleans(),
    requests=st.integers(1, 9),
    interrupts=st.booleans(),
    tenants=st.integers(1, 3),
)


class Trace:
    """Plays one world to its end."""

    def __init__(self, world: World):
        self.world = world
        self.rng = rng = random.Random(world.seed)
        self.now = 0.0
        self.spec = make_spec(
            slots=world.slots,
            pages=world.pages,
            page_size=world.page_size,
            max_model_len=24,
            vocab=VOCAB,
            tokens=world.budget,
            max_k=world.max_k,
        )
        self.runner = FakeRunner(self.spec, random.Random(rng.random()))
        self.scheduler = Scheduler(
            self.spec,
            max_batched_tokens=max(world.budget, world.slots + 1),
            prefill_chunk=world.chunk,
            prefix_caching=world.caching,
            clock=lambda: self.now,
        )
        names = [str(n) for n in range(world.tenants)]
        self.scheduler.set_weights({name: n + 1 for n, name in enumerate(names)})
        self.tenants = names
        self.flights: deque = deque()
        self.stories: dict[str, Story] = {}
        self.prefixes = [self.some_tokens(rng.randint(0, 9)) for _ in range(2)]
        self.plans: list[StepPlan] = []
        self.stalled = 0
        self.delivered = 0  # tokens the runner gave, those past a stop included
        self.empty_rows = 0  # decode rows that gave none

    def some_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.randrange(VOCAB) for _ in range(count))

    def play(self) -> None:
        world, rng = self.world, self.rng
        left = world.requests
        while left:
            for _ in range(min(left, rng.choice((0, 0, 1, 1, 2, 4)))):
                self.arrive(str(left))
                left -= 1
            if world.interrupts and self.stories and rng.random() < 0.15:
                self.interrupt(rng.choice(list(self.stories.values())))
            self.step()
        work = sum(len(s.ends) * (len(s.request.prompt) + 24) for s in self.stories.values())
        for _ in range(8 * work + 20):
            if not self.scheduler.unfinished and not self.flights:
                break
            self.step()
        self.check_the_end()

    def arrive(self, id: str) -> None:
        rng = self.rng
        prompt = rng.choice(self.prefixes) + self.some_tokens(rng.randint(1, 8))
        room = context_limit(self.spec)[0]
        prompt = prompt[: room - 1]
        room -= len(prompt)
        max_tokens = rng.choice((1, 2, 4, 8, 12, None))
        request = make_request(
            id,
            prompt,
            max_tokens and min(max_tokens, room),
            min_tokens=rng.choice((0, 0, 1, 3)) if (max_tokens or 12) > 3 and room > 3 else 0,
            eos_ids=rng.choice(((), (3,), (3, 5))),
            ignore_eos=rng.random() < 0.2,
            stop_token_ids=rng.choice(((), (7,))),
            priority=rng.choice((0, 0, 1)),
            cache_salt=rng.choice(("", "", "x")),
            tenant=rng.choice(self.tenants),
            seed=rng.randrange(3),
            deadline=self.now + rng.randint(1, 60)
            if self.world.interrupts and rng.random() < 0.2
            else None,
            **({"pooled": True} if rng.random() < 0.1 else self.rarities()),
        )
        self.scheduler.submit(request)
        self.stories[id] = Story.of(request)

    def rarities(self) -> dict[str, object]:
        """Several choices, controls, log-probabilities of the prompt."""
        rng, more = self.rng, {}
        if rng.random() < 0.1:
            more["n"] = rng.choice((2, 3))
        if rng.random() < 0.1:
            more["prompt_logprobs"] = 1
        if rng.random() < 0.1:
            more |= rng.choice(
                (
                    {"frequency_penalty": 0.5, "repetition_penalty": 1.5},
                    {"logit_bias": {1: 2.0, 4: -1.0}, "presence_penalty": 1.0},
                    {"allowed_token_ids": (2, 3, 9), "bad_words": ((2, 2), (9,))},
                    {"bad_words": ((1,), (4, 5), (6, 7, 8))},
                )
            )
        return more

    def interrupt(self, story: Story) -> None:
        """The caller leaves, or the text layer found a stop string; perhaps twice, or too late."""
        reason = self.rng.choice((FinishReason.ABORT, FinishReason.STOP))
        choice = None
        if len(story.ends) > 1 and self.rng.random() < 0.5:
            # The text layer has seen some of the answer that it stops.
            choice = self.rng.choice([c for c, t in enumerate(story.tokens) if t or not c])
        for each in range(len(story.ends)) if choice is None else [choice]:
            if story.ends[each] is None and story.ended is None and story.ended_by[each] is None:
                story.ended_by[each] = reason
        self.scheduler.finish(story.request.id, reason, choice)

    def step(self) -> None:
        self.now += 1
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is None:
            assert self.flights or not self.scheduler.unfinished, "stuck"
        else:
            self.check_the_first_advances(plan)
            self.flights.append((plan, self.runner.launch(plan)))
            self.plans.append(plan)
        if len(self.flights) > (self.world.depth if plan is not None else 0):
            plan, handle = self.flights.popleft()
            outputs = self.runner.collect(handle)
            self.delivered += int(outputs.n_valid.sum())
            self.empty_rows += int((outputs.n_valid[: plan.num_decode] == 0).sum())
            self.hear(self.scheduler.update(plan, outputs))
        else:
            self.hear(self.scheduler.take_outputs())
        self.scheduler.check_integrity()

    def check_the_first_advances(self, plan) -> None:
        """Whoever is first in order gets a row, or has results on the way, at every step."""
        running = self.scheduler._roster.running
        if not running or running.first.slot in plan.slots:
            self.stalled = 0
            return
        self.stalled += 1
        assert running.first.in_flight or self.stalled <= self.world.depth + 1, "starved"

    def hear(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            story = self.stories[output.request_id]
            assert story.ended is None and story.ends[output.choice] is None, "one after the last"
            story.tokens[output.choice] += output.tokens
            if output.finish_reason is not None:
                story.ends[output.choice] = output
            if output.ended:
                assert output.error or all(story.ends), "it ended before its choices"
                story.ended = output
            if output.prompt_logprobs is not None:
                assert story.scores is None and output.choice == 0
                story.scores = [entry and entry.logprob for entry in output.prompt_logprobs]

    def check_the_end(self) -> None:
        for story in self.stories.values():
            request = story.request
            assert story.ended is not None, f"{request.id} never ended"
            if request.sampling.prompt_logprobs is None or not story.tokens[0]:
                assert story.scores is None
            else:
                assert story.scores == expected_scores(request)
            for choice, end in enumerate(story.ends):
                self.check_the_end_of(story, choice, end or story.ended)
        self.check_what_is_left()

    def check_the_end_of(self, story: Story, choice: int, end: RequestOutput) -> None:
        request, tokens, ended_by = story.request, story.tokens[choice], story.ended_by[choice]
        if request.pooled:
            assert not tokens
            if ended_by is None and end.error is None:
                assert end.pooled.tolist() == expected_embedding(request.prompt).tolist()
            return
        limit = resolve_max_tokens(request, self.spec)
        answer, stop = expected_answer(request, VOCAB, limit, choice)
        if end.finish_reason in (FinishReason.LENGTH, FinishReason.STOP) and (
            ended_by is None or tokens == answer
        ):
            assert tokens == answer
            if ended_by is None:
                assert end.stop_token == stop
                assert (end.finish_reason is FinishReason.STOP) == (stop is not None)
            return
        assert tokens == answer[: len(tokens)]
        if end.finish_reason is FinishReason.ERROR:
            assert isinstance(end.error, DeadlineExceeded)
        else:
            assert end.finish_reason is ended_by

    def check_what_is_left(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert stats.output_tokens == sum(
            len(tokens) for s in self.stories.values() for tokens in s.tokens
        )
        assert self.world.caching or stats.pages_cached == 0


@settings(
    max_examples=1700,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(worlds)
def test_any_trace_ends_right(world: World) -> None:
    Trace(world).play()


@pytest.mark.slow
@settings(
    max_examples=50_000,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(worlds)
def test_many_more_traces_end_right(world: World) -> None:
    Trace(world).play()


def test_traces_reach_what_they_are_for() -> None:
    """The traces would prove little if they never preempted, shared, overran or expired."""
    preempted = hits = recomputed = overran = empty = expired = 0
    several = reshaped = scored = many = pooled = 0  # choices, rows, rows, dispatches, rows
    for seed in range(150):
        trace = Trace(World(seed, 2, 14, 4, 3, 16, 6, 1, True, 8, True))
        trace.play()
        stats = trace.scheduler.stats()
        preempted += stats.preemptions
        hits += stats.prefix_hit_tokens
        recomputed += stats.recomputed_tokens
        overran += trace.delivered - stats.output_tokens
        empty += trace.empty_rows
        several += sum(len(s.ends) for s in trace.stories.values() if len(s.ends) > 1)
        reshaped += sum(init.controlled for plan in trace.plans for init in plan.inits)
        scored += sum(len(plan.scored) for plan in trace.plans)
        many += sum(plan.k > 1 for plan in trace.plans)
        pooled += sum(int((plan.emits == Emit.POOLED).sum()) for plan in trace.plans)
        expired += sum(
            isinstance(story.ended.error, DeadlineExceeded) for story in trace.stories.values()
        )
    assert preempted > 50
    assert hits > 500
    assert recomputed > 20
    assert overran > 100
    assert empty > 100
    assert expired > 10
    assert several > 100
    assert reshaped > 100
    assert scored > 100
    assert many > 100
    assert pooled > 100
