"""A request that cannot be taken on fails alone, wherever taking it on stops half-way.

Faults are injected before every line that `Scheduler.add` runs, one line at a time; what is left
behind must be what was there before, and everybody else is served as if nothing had been.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from driver import Driver
from fake_runner import FakeRunner, make_request, make_spec
from injection import Injected, Injector

from quire.errors import Internal
from quire.sched.engine import Engine
from quire.sched.fairness import FairQueue
from quire.sched.request import FinishReason, Request, RequestOutput
from quire.sched.scheduler import Scheduler


def failing_at(line: int, work: Callable[[], object]) -> bool:
    """Does work, and stops it before its so-manieth line; whether it came that far."""
    try:
        Injector(line)(work)
    except Injected:
        return True
    return False


def state_of(scheduler: Scheduler) -> Any:
    """All that a request could leave behind, but for the number that it was to have. Entries of the
    heap may be out of date; `check_integrity` knows whether the right one is first."""
    roster, queue = scheduler._roster, scheduler._roster.waiting
    deadlines = [group.id for group in roster._deadlines]
    tenants = {
        name: (t.weight, t.time, t.new, t.running, [seq.id for seq in t.waiting])
        for name, t in queue.tenants.items()
    }
    counts = (queue._count, queue.new, queue._active, queue.active_weight, len(roster))
    first = [e[3].name for e in queue._heap if e is e[3].entry]
    return list(roster._by_id), deadlines, tenants, counts, sorted(first)


def empty() -> Driver:
    return Driver(make_spec(slots=2, pages=60))


def busy() -> Driver:
    """Two tenants run and wait, a third is away and has had more than its share."""
    d = Driver(make_spec(slots=2, pages=60))
    d.scheduler.set_weights({"a": 2.0})
    d.submit(make_request("gone", tenant="ahead"), make_request("a0", tenant="a", deadline=1e6))
    d.submit(*(make_request(f"{t}{n}", (n, 3), 9, tenant=t) for n in (1, 2) for t in "ab"))
    while "gone" not in d.ended:
        d.step()
    assert "ahead" in d.scheduler._roster.waiting.tenants
    return d


REQUESTS = {
    "plain": make_request("bad"),
    "first of its tenant": make_request("bad", tenant="a", priority=-1, deadline=5e5),
    "last of its tenant": make_request("bad", tenant="b", deadline=2e6),
    "of who was ahead": make_request("bad", tenant="ahead"),
    "of a new tenant": make_request("bad", tenant="new", n=3, allowed_token_ids=[1, 2, 3]),
}


@pytest.mark.parametrize("make", [empty, busy])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=list(REQUESTS))
def test_a_fault_anywhere_in_add_leaves_nothing_behind(
    make: Callable[[], Driver], request_: Request
) -> None:
    d, lines = make(), 0
    before = state_of(d.scheduler)
    while failing_at(lines, lambda: d.scheduler.add(request_)):
        d.scheduler.check_integrity()
        assert state_of(d.scheduler) == before, f"line {lines}"
        lines += 1
    assert lines > 30  # of several modules
    d.scheduler.check_integrity()
    d.run(2000)
    assert d.tokens["bad"] == d.answer(request_)


def test_who_was_ahead_still_is() -> None:
    d = busy()
    ahead = d.scheduler._roster.waiting.tenants["ahead"]
    time = ahead.time
    queue = FairQueue._push
    try:
        FairQueue._push = fails  # type: ignore[method-assign,assignment]
        with pytest.raises(ZeroDivisionError):
            d.scheduler.add(REQUESTS["of who was ahead"])
    finally:
        FairQueue._push = queue  # type: ignore[method-assign]
    assert d.scheduler._roster.waiting.tenant("ahead") is ahead and ahead.time == time


def fails(*_: object) -> None:
    raise ZeroDivisionError("secret")


@pytest.fixture(params=["quire.sched.sequence.stop_ids", "quire.sched.fairness.FairQueue._push"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Taking on fails for requests with an even number."""
    *path, name = request.param.split(".")
    owner: Any = sys.modules[".".join(path)] if path[-1] != "FairQueue" else FairQueue
    sound = getattr(owner, name)

    def breaks(*args: Any) -> Any:
        last = args[-1]
        id = last.id if isinstance(last, Request) else last.waiting.first.id
        return fails() if int(id) % 2 == 0 else sound(*args)

    monkeypatch.setattr(owner, name, breaks)
    yield


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("overlap", [False, True])
def test_the_engine_goes_on(overlap: bool, caplog: pytest.LogCaptureFixture) -> None:
    spec, heard, calls = make_spec(), list[RequestOutput](), []

    def hear(outputs: list[RequestOutput]) -> None:
        calls.append(1)
        heard.extend(outputs)

    scheduler = Scheduler(spec, max_batched_tokens=32, prefill_chunk=32)
    engine = Engine(FakeRunner(spec), scheduler, overlap=overlap, on_outputs=hear)
    for n in range(6):
        engine.submit(make_request(str(n), (n, 1), tenant=str(n), max_tokens=3))
    engine.finish("2")  # before the engine knows that there is none
    while engine.has_work:
        before = len(calls)
        engine.step()
        assert len(calls) <= before + 1
        scheduler.check_integrity()
    ends = {output.request_id: output for output in heard if output.ended}
    assert len([o for o in heard if o.ended]) == len(ends) == 6
    for n in range(6):
        end = ends[str(n)]
        if n % 2:
            assert end.finish_reason is FinishReason.LENGTH
            continue
        assert isinstance(end.error, Internal)
        assert str(end.error) == f"request '{n}': a fault in Quire; the engine's log says more"
        assert end.account is not None and end.account.request.tenant == str(n)
        assert end.timing is not None and end.timing.seconds >= 0
    assert "secret" in caplog.text and engine.healthy
    engine.submit(make_request("1"))  # and ids are free again
    engine.stop()
