"""Limits of tenants: nothing above them is accepted, nothing below them refused, and what a refusal
says of when to come back is true."""

from __future__ import annotations

import time

import pytest
from fake_runner import FakeRunner, make_request, make_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequest, Overloaded, Unavailable
from quire.sched.engine import Engine
from quire.sched.quota import Limits, Quotas
from quire.sched.request import FinishReason, Request, RequestOutput
from quire.sched.scheduler import Scheduler


class World:
    """One tenant and its clock."""

    def __init__(self, **limits: int):
        self.now = 1000.0
        self.quotas = Quotas(lambda: self.now)
        self.quotas.update({"t": Limits(**limits), "another": Limits()})
        self.accepted: list[tuple[float, int]] = []  # when, prompt tokens
        self.running: list[str] = []
        self.number = 0

    def ask(self, prompt: int = 1, tenant: str = "t", **more: object) -> str:
        self.number += 1
        request = make_request(str(self.number), (1,) * prompt, tenant=tenant, **more)
        self.quotas.accept(request)
        self.accepted.append((self.now, prompt))
        self.running.append(request.id)
        return request.id

    def hear(self, id: str, tokens: int, ended: bool = False) -> None:
        self.quotas.observe([RequestOutput(id, (1,) * tokens, ended=ended)])
        if ended:
            self.running.remove(id)


steps = st.lists(
    st.tuples(
        st.floats(0, 40),  # seconds
        st.sampled_from(["ask", "ask", "ask", "tokens", "end"]),
        st.integers(1, 60),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 30), st.integers(60, 600), st.integers(1, 5), steps)
def test_limits_hold_and_retry_after_is_true(
    requests: int, tokens: int, most: int, story: list[tuple[float, str, int]]
) -> None:
    w = World(requests_per_minute=requests, tokens_per_minute=tokens, concurrency=most)
    produced: list[tuple[float, int]] = []
    for passed, what, number in story:
        w.now += passed
        if what == "tokens" and w.running:
            w.hear(w.running[0], number)
            produced.append((w.now, number))
        elif what == "end" and w.running:
            w.hear(w.running[0], 0, ended=True)
        elif what == "ask":
            try:
                w.ask(number)
            except Overloaded as refused:
                assert refused.retry_after > 0
                if len(w.running) == most:
                    assert "concurrency" in str(refused) or refused.retry_after >= 1
                    continue
                before, begin = 0.98 * refused.retry_after, w.now
                w.now = begin + before
                if refused.retry_after > 1e-3:
                    with pytest.raises(Overloaded):
                        w.ask(number)
                w.now = begin + refused.retry_after
                w.ask(number)
        assert len(w.running) <= most
    # However a window is chosen: what was there at its beginning, and what flowed in.
    for first, (begin, _) in enumerate(w.accepted):
        for last in range(first, len(w.accepted)):
            window = w.accepted[first : last + 1]
            minutes = (window[-1][0] - begin) / 60
            assert len(window) <= requests * (1 + minutes) + 1e-6
            used = sum(prompt for _, prompt in window)
            # What came after the window's last prompt was not taken yet when that was accepted;
            # in between, answers count as prompts do.
            used += sum(n for at, n in produced if begin < at < window[-1][0])
            assert used <= tokens * (1 + minutes) + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 30), st.lists(st.floats(0, 10), max_size=50))
def test_nothing_is_refused_below_the_limit(rate: int, gaps: list[float]) -> None:
    w = World(requests_per_minute=rate)
    for gap in gaps:
        w.now += max(gap, 60 / rate * 1.000001)
        w.ask()


def test_a_refusal_takes_nothing() -> None:
    w = World(requests_per_minute=2, tokens_per_minute=100)
    w.ask(90)
    for _ in range(50):
        with pytest.raises(Overloaded, match="tokens_per_minute: tenant 't' is at its limit of 10"):
            w.ask(20)
    w.ask(10)
    with pytest.raises(Overloaded, match="requests_per_minute"):
        w.ask(1)


def test_an_answer_may_leave_less_than_nothing() -> None:
    w = World(tokens_per_minute=60)
    id = w.ask(10)
    w.hear(id, 110)
    with pytest.raises(Overloaded) as caught:
        w.ask(1)
    assert caught.value.retry_after == pytest.approx(61)


def test_answers_at_once_are_counted_until_their_request_ends() -> None:
    w = World(concurrency=5)
    id = w.ask(n=4)
    w.ask()
    with pytest.raises(Overloaded, match="concurrency"):
        w.ask()
    w.now += 7
    w.hear(id, 3)
    with pytest.raises(Overloaded):
        w.ask()
    w.hear(id, 0, ended=True)
    w.ask(n=4)
    with pytest.raises(Overloaded) as caught:
        w.ask()
    assert caught.value.retry_after == 7


@pytest.mark.parametrize(
    ("limits", "asked", "says"),
    [
        ({"top_priority": 0}, {"priority": -1}, "priority: got -1, must be at least 0 for tenant"),
        ({"concurrency": 3}, {"n": 4}, "n, best_of: got 4, must be at most 3"),
        ({"tokens_per_minute": 9}, {"prompt": 10}, "prompt: got '10 tokens', must be at most 9"),
    ],
)
def test_what_can_never_be_accepted_is_not_told_to_come_back(limits, asked, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        World(**limits).ask(**asked)
    World(**limits).ask(tenant="another", **asked)


def test_new_limits_count_what_was_used_before() -> None:
    w = World(requests_per_minute=10)
    for _ in range(8):
        w.ask()
    w.quotas.update({"t": Limits(requests_per_minute=9, concurrency=9)})
    w.ask()
    with pytest.raises(Overloaded):
        w.ask()
    w.quotas.update({"t": Limits()})
    for _ in range(20):
        w.ask()


def test_nobody_is_served_without_the_limits_that_were_set() -> None:
    """A frontend may have read of a tenant before the engine has, or of its end after it."""
    quotas = Quotas(lambda: 0.0)
    quotas.accept(make_request("before anything was set", tenant="new"))
    quotas.update({"t": Limits()})
    for tenant in ("new", ""):
        with pytest.raises(Unavailable, match=f"^tenant: '{tenant}' is not known to the engine"):
            quotas.accept(make_request("too early", tenant=tenant))
    quotas.update({"new": Limits(requests_per_minute=1)})
    quotas.accept(make_request("a", tenant="new"))
    with pytest.raises(Overloaded):
        quotas.accept(make_request("b", tenant="new"))
    with pytest.raises(Unavailable):
        quotas.accept(make_request("too late", tenant="t"))
    quotas.update({})
    with pytest.raises(Unavailable):
        quotas.accept(make_request("c", tenant="new"))


# ---- in the engine


def make_engine(table: dict[str, Limits]) -> tuple[Engine, list[RequestOutput]]:
    spec = make_spec(slots=2)
    heard: list[RequestOutput] = []
    scheduler = Scheduler(spec, max_batched_tokens=32, prefill_chunk=32)
    engine = Engine(FakeRunner(spec), scheduler, overlap=True, on_outputs=heard.extend)
    engine.limit_tenants(table)
    return engine, heard


def play(engine: Engine) -> None:
    end = time.monotonic() + 20
    while engine.has_work and time.monotonic() < end:
        engine.step()


def request(id: str, **more: object) -> Request:
    return make_request(id, tenant="t", **more)


def test_the_engine_counts_tokens_and_ends() -> None:
    limits = Limits(tokens_per_minute=20, concurrency=2)
    engine, heard = make_engine({"t": limits, "": Limits()})
    engine.submit(request("a", max_tokens=10))
    engine.submit(request("b", max_tokens=9))
    with pytest.raises(Overloaded, match="concurrency"):
        engine.submit(request("c", max_tokens=1))
    engine.submit(make_request("other"))
    play(engine)
    assert sum(output.ended for output in heard) == 3
    with pytest.raises(Overloaded, match="tokens_per_minute") as caught:
        engine.submit(request("c", max_tokens=1))  # 6 + 19 of 20 are gone, and it wants 3
    assert 15 < caught.value.retry_after < 25
    assert not engine._quotas._open


def test_who_is_refused_otherwise_is_not_counted() -> None:
    engine, _ = make_engine({"t": Limits(requests_per_minute=2)})
    engine.submit(request("a"))
    for _ in range(5):
        with pytest.raises(InvalidRequest):
            engine.submit(request("a"))
        with pytest.raises(InvalidRequest):
            engine.submit(request("b", max_tokens=1000))
    engine.submit(request("b"))


def test_who_is_not_known_yet_leaves_nothing_behind() -> None:
    engine, _ = make_engine({"t": Limits()})
    with pytest.raises(Unavailable, match="'new' is not known"):
        engine.submit(make_request("a", tenant="new"))
    assert not engine.has_work or [message.of for message in engine._inbox] == [{"t": 1.0}]
    engine.limit_tenants({"t": Limits(), "new": Limits()})
    engine.submit(make_request("a", tenant="new"))  # the id is free


def test_an_aborted_request_gives_its_place_back() -> None:
    engine, _ = make_engine({"t": Limits(concurrency=1)})
    for n in range(3):
        engine.submit(request(str(n), max_tokens=50))
        engine.step()
        engine.finish(str(n), FinishReason.ABORT)
        play(engine)


def test_weights_reach_the_scheduler() -> None:
    engine, _ = make_engine({"t": Limits(weight=3.0)})
    engine.step()
    assert engine._scheduler._roster.waiting.tenant("t").weight == 3
    assert engine._scheduler._roster.waiting.tenant("other").weight == 1
