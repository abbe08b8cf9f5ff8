"""The loop and its thread: nothing hangs, and every accepted request ends exactly once."""

import threading
import time
import weakref

import pytest
from fake_runner import FakeRunner, expected_answer, make_request, make_spec

from quire.errors import Internal, InvalidRequest, Overloaded, QuireError, Unavailable
from quire.model.plan import StepPlan
from quire.sched.engine import IDLE_BEFORE_CHECK, Engine, State
from quire.sched.request import FinishReason, Request, RequestOutput
from quire.sched.scheduler import Scheduler

SPEC = make_spec(max_k=2)
PATIENCE = 60.0


class Callers:
    """Collects outputs, and lets a test wait for ends."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, RequestOutput] = {}
        self.calls = 0
        self._changed = threading.Condition()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        assert outputs
        with self._changed:
            self.calls += 1
            for output in outputs:
                assert output.request_id not in self.ends, "an output after the last"
                self.tokens.setdefault(output.request_id, []).extend(output.tokens)
                if output.finish_reason is not None:
                    self.ends[output.request_id] = output
            self._changed.notify_all()

    def wait(self, *ids: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(ids) <= set(self.ends), PATIENCE), "hangs"

    def wait_for_tokens(self, id: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.tokens.get(id), PATIENCE), "hangs"

    def error(self, id: str) -> QuireError | None:
        return self.ends[id].error


class SlowRunner(FakeRunner):
    """Takes long enough for a test to come between steps; can be held.

    Args:
      hold_at: after so many results it gives none, until the gate is set.
    """

    def __init__(self, *args, hold_at: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = threading.Event()
        self.gate.set()
        self._hold_at = hold_at

    def collect(self, handle):
        time.sleep(0.001)
        if self.collects == self._hold_at:
            self.gate.clear()
        assert self.gate.wait(PATIENCE)
        return super().collect(handle)


def make_engine(
    runner: FakeRunner | None = None,
    overlap: bool = True,
    idle_before_check: float = IDLE_BEFORE_CHECK,
    **settings: int,
):
    callers = Callers()
    scheduler = Scheduler(SPEC, **{"max_batched_tokens": 32, "prefill_chunk": 32, **settings})
    engine = Engine(
        runner or FakeRunner(SPEC),
        scheduler,
        overlap=overlap,
        on_outputs=callers,
        idle_before_check=idle_before_check,
    )
    return engine, callers


def answer(request: Request) -> list[int]:
    return expected_answer(request, SPEC.vocab_size, request.sampling.max_tokens or 0)[0]


def long_request(id: str) -> Request:
    return make_request(id, max_tokens=60)


@pytest.fixture(params=[False, True], ids=["in turn", "overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_steps_without_a_thread(overlap: bool) -> None:
    engine, callers = make_engine(overlap=overlap)
    requests = [make_request(str(n), (n + 1, 2, 3), max_tokens=9) for n in range(6)]
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        calls = callers.calls
        engine.step()
        assert callers.calls - calls <= 1
    for request in requests:
        assert callers.tokens[request.id] == answer(request)
    engine.stop()
    assert not engine.healthy


def test_overlap_launches_a_step_before_it_reads_the_last(overlap: bool) -> None:
    runner = FakeRunner(SPEC)
    engine, _ = make_engine(runner, overlap=overlap)
    engine.submit(make_request(max_tokens=9))
    engine.step()
    engine.step()
    assert (runner.launches, runner.collects) == (2, 1 if overlap else 2)


def test_a_thread_serves_many_submitters(overlap: bool) -> None:
    engine, callers = make_engine(overlap=overlap)
    engine.start()
    requests = [make_request(str(n), (n % 7, 2, 3, 4, 5), 7, seed=n) for n in range(60)]

    def submit(part: int) -> None:
        for request in requests[part::4]:
            engine.submit(request)

    threads = [threading.Thread(target=submit, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    callers.wait(*(request.id for request in requests))
    for request in requests:
        assert callers.tokens[request.id] == answer(request)
    engine.stop()
    stats = engine.stats()
    assert (stats.finished, stats.running, stats.waiting, stats.pages_used) == (60, 0, 0, 0)
    assert stats.output_tokens == 60 * 7


def test_submit_refuses_at_once() -> None:
    engine, _ = make_engine(max_queue=2)
    with pytest.raises(InvalidRequest, match="prompt"):
        engine.submit(make_request(prompt=()))
    engine.submit(make_request("a"))
    with pytest.raises(InvalidRequest, match="id"):
        engine.submit(make_request("a"))
    engine.submit(make_request("b"))
    with pytest.raises(Overloaded):
        engine.submit(make_request("c"))
    engine.step()  # both are admitted
    engine.submit(make_request("c"))
    engine.stop()


def test_finish_ends_a_request_early_and_only_once() -> None:
    engine, callers = make_engine(runner := SlowRunner(SPEC, hold_at=3))
    engine.start()
    engine.submit(long_request("a"))
    callers.wait_for_tokens("a")
    while runner.gate.is_set():  # else it could be cleared when nobody sets it again
        time.sleep(0.001)
    engine.finish("a", FinishReason.STOP)
    engine.finish("a")
    engine.finish("nobody")
    runner.gate.set()
    callers.wait("a")
    assert callers.ends["a"].finish_reason is FinishReason.STOP
    with pytest.raises(InvalidRequest, match="reason"):
        engine.finish("a", FinishReason.ERROR)
    engine.submit(make_request("a", max_tokens=1))  # the id is free again
    engine.stop()


def test_finish_of_a_request_that_is_still_in_the_inbox() -> None:
    engine, callers = make_engine()
    engine.submit(make_request("a"))
    engine.finish("a")
    engine.step()
    assert callers.ends["a"].finish_reason is FinishReason.ABORT


def test_a_deadline_wakes_nobody_but_ends_the_request() -> None:
    engine, callers = make_engine(SlowRunner(SPEC))
    engine.start()
    engine.submit(make_request("a", max_tokens=60, deadline=time.monotonic() + 0.01))
    callers.wait("a")
    engine.stop()
    assert callers.ends["a"].finish_reason is FinishReason.ERROR


def test_stop_drains() -> None:
    engine, callers = make_engine(SlowRunner(SPEC))
    engine.start()
    requests = [make_request(str(n), max_tokens=12) for n in range(9)]
    for request in requests:
        engine.submit(request)
    engine.stop()
    assert len(callers.ends) == 9
    assert all(callers.tokens[r.id] == answer(r) for r in requests)
    with pytest.raises(Unavailable):
        engine.submit(make_request("late"))
    engine.stop()  # again: nothing happens


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(("drain", "timeout"), [(False, None), (True, 0.01)])
def test_stop_in_haste_tells_everybody(threaded: bool, drain: bool, timeout: float | None) -> None:
    engine, callers = make_engine(runner := SlowRunner(SPEC))
    for n in range(30):
        engine.submit(make_request(str(n), max_tokens=40))

    def some(seconds: float) -> bool:
        """However late this thread is, most have not ended when it closes the engine."""
        end = time.monotonic() + seconds
        while runner.collects > 20 and engine._state is not State.CLOSED:
            assert time.monotonic() < end, "hangs"
            time.sleep(0.001)
        return True

    if threaded:
        runner.gate.wait = some  # type: ignore[method-assign]
        engine.start()
    engine.stop(drain=drain, timeout=timeout)
    assert len(callers.ends) == 30
    assert any(isinstance(end.error, Unavailable) for end in callers.ends.values())


def test_stop_does_not_wait_for_a_device_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.sched.engine.JOIN_GRACE", 0.05)
    runner = SlowRunner(SPEC, hold_at=3)
    engine, callers = make_engine(runner)
    engine.start()
    engine.submit(long_request("a"))
    callers.wait_for_tokens("a")
    engine.stop(drain=True, timeout=0.05)
    assert isinstance(callers.error("a"), Unavailable)
    runner.gate.set()  # what it gives now is heard by nobody
    assert engine._thread is not None
    engine._thread.join(PATIENCE)
    assert not engine._thread.is_alive()


@pytest.mark.parametrize("where", ["fail_launch", "fail_collect"])
def test_after_one_device_failure_answers_are_whole(where: str, overlap: bool) -> None:
    runner = FakeRunner(SPEC, **{where: (3,)})
    engine, callers = make_engine(runner, overlap=overlap)
    requests = [make_request(str(n), (n + 1, 2, 3), max_tokens=9) for n in range(6)]
    for request in requests:
        engine.submit(request)
    engine.start()
    callers.wait(*(request.id for request in requests))
    engine.stop()
    assert runner.resets == 1 and engine.stats().failed_steps == 1
    for request in requests:
        assert callers.tokens[request.id] == answer(request)


def test_after_two_device_failures_a_request_ends_and_the_engine_goes_on(overlap: bool) -> None:
    runner = FakeRunner(SPEC, fail_launch=(1, 3))
    engine, callers = make_engine(runner, overlap=overlap)
    engine.submit(make_request("a", max_tokens=20))
    engine.start()
    callers.wait("a")
    assert isinstance(callers.error("a"), Internal)
    engine.submit(request := make_request("b"))
    callers.wait("b")
    assert callers.tokens["b"] == answer(request)
    engine.stop()


@pytest.mark.parametrize("method", ["schedule", "update"])
def test_a_fault_of_the_scheduler_leaves_nobody_waiting(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Callers, who may be anybody, hear of it; the log and callers in process hear what it was.

    Nothing can be planned any more, and the engine closes; or a step can, and costs who ran in it.
    """
    engine, callers = make_engine()
    original = getattr(engine._scheduler, method)
    calls = []

    def breaks(*args: object) -> object:
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("a bug")
        return original(*args)

    monkeypatch.setattr(engine._scheduler, method, breaks)
    for n in range(6):
        engine.submit(make_request(str(n), max_tokens=20))
    engine.start()
    callers.wait(*map(str, range(6)))
    error = callers.error("0")
    assert isinstance(error, Internal) and isinstance(error.__cause__, KeyError)
    assert "a bug" in caplog.text
    if method == "update":
        assert "a step failed for the second time" in str(error) and engine.healthy
        engine.stop()
        return
    assert str(error) == "request '0': the engine failed; its log says why"
    with pytest.raises(Unavailable, match=r"^request 'late': the engine failed; its log says why$"):
        engine.submit(make_request("late"))
    assert not engine.healthy
    engine.stop()


def test_what_a_failed_launch_held_is_gone_before_all_is_made_anew() -> None:
    """The old KV and the new one may not fit beside each other."""

    class KV:
        pass

    gone = list[bool]()

    class Full(FakeRunner):
        def launch(self, plan: StepPlan) -> object:
            kv = KV()
            if not gone:
                self.held = weakref.ref(kv)
                raise RuntimeError("no memory")
            return super().launch(plan)

        def reset(self) -> None:
            gone.append(self.held() is None)
            super().reset()

    engine, callers = make_engine(Full(SPEC))
    engine.submit(request := make_request("a"))
    engine.start()
    callers.wait("a")
    engine.stop()
    assert gone == [True] and callers.tokens["a"] == answer(request)


def test_a_reset_that_fails_closes_the_engine() -> None:
    class Broken(FakeRunner):
        def reset(self) -> None:
            raise RuntimeError("no device")

    engine, callers = make_engine(Broken(SPEC, fail_launch=(0,)))
    engine.submit(make_request("a"))
    engine.step()
    assert isinstance(callers.error("a"), Internal) and not engine.healthy


def test_a_scheduler_that_stands_still_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, callers = make_engine()
    monkeypatch.setattr(engine._scheduler, "schedule", lambda: None)
    engine.submit(make_request("a"))
    engine.start()
    callers.wait("a")
    assert "no progress" in str(callers.error("a").__cause__)


def test_listeners_that_fail_close_the_engine() -> None:
    def deaf(outputs: list[RequestOutput]) -> None:
        raise OSError("gone")

    scheduler = Scheduler(SPEC, max_batched_tokens=32, prefill_chunk=32)
    engine = Engine(FakeRunner(SPEC), scheduler, overlap=False, on_outputs=deaf)
    engine.submit(make_request())
    engine.step()
    assert not engine.healthy


def test_an_idle_engine_checks_itself_and_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, callers = make_engine(idle_before_check=0.01)
    scheduler, checks, plans = engine._scheduler, [], []
    schedule, checked = scheduler.schedule, threading.Event()

    def counted() -> StepPlan | None:
        plans.append(1)
        return schedule()

    def check() -> None:
        checks.append(1)
        if "a" in callers.ends:
            checked.set()

    monkeypatch.setattr(scheduler, "check_integrity", check)
    monkeypatch.setattr(scheduler, "schedule", counted)
    engine.start()
    engine.submit(make_request("a"))
    callers.wait("a")
    assert checked.wait(PATIENCE)
    time.sleep(0.1)
    assert 1 <= len(checks) <= 2  # perhaps once before the request, and once after
    assert len(plans) < 20
    engine.stop()


def test_a_leak_found_while_idle_closes_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, _ = make_engine(idle_before_check=0.01)
    engine._scheduler._cache._pages._free.pop()
    engine.start()
    assert engine._thread is not None
    engine._thread.join(PATIENCE)
    assert not engine.healthy and "pages lost" in caplog.text
    with pytest.raises(Unavailable, match="the engine failed; its log says why"):
        engine.submit(make_request())


def test_a_request_of_several_choices_is_live_until_the_last_has_ended(overlap: bool) -> None:
    outputs: list[RequestOutput] = []
    scheduler = Scheduler(SPEC, max_batched_tokens=32, prefill_chunk=32, max_queue=1)
    engine = Engine(FakeRunner(SPEC), scheduler, overlap=overlap, on_outputs=outputs.extend)
    engine.submit(request := make_request(n=6, max_tokens=8))  # more than slots
    with pytest.raises(Overloaded, match="1 requests wait"):
        engine.submit(make_request("b"))
    for _ in range(4):
        engine.step()
    engine.finish("a", FinishReason.STOP, 0)
    engine.step()
    assert [o.choice for o in outputs if o.finish_reason] == [0]
    with pytest.raises(InvalidRequest, match="id"):
        engine.submit(request)
    while engine.has_work:
        engine.step()
    assert sorted(o.choice for o in outputs if o.finish_reason) == list(range(6))
    assert [o.ended for o in outputs] == [False] * (len(outputs) - 1) + [True]
    engine.submit(request)
    engine.stop(drain=False)
    assert isinstance(outputs[-1].error, Unavailable) and outputs[-1].ended
    assert sum(o.ended for o in outputs) == 2
