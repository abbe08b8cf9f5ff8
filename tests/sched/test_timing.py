"""Where a request's time went, and how long steps took, by a clock that the test turns."""

from __future__ import annotations

import pytest
from driver import Driver
from fake_runner import FakeRunner, make_request, make_spec

from quire.model.plan import RunnerSpec, StepPlan
from quire.sched.engine import Engine
from quire.sched.request import FinishReason, RequestOutput, Timing
from quire.sched.scheduler import Scheduler
from quire.sched.stats import STEP_BOUNDS

SPEC = make_spec()


def ends(outputs: list[RequestOutput]) -> dict[str, RequestOutput]:
    return {output.request_id: output for output in outputs if output.ended}


class Told(Driver):
    """Keeps the last output of each request, and checks that only those have a timing."""

    def __init__(self, spec: RunnerSpec = SPEC, **settings: object):
        super().__init__(spec, **settings)
        self.last: dict[str, RequestOutput] = {}

    def hear(self, outputs: list[RequestOutput]) -> None:
        super().hear(outputs)
        for output in outputs:
            assert (output.timing is not None) == (output.account is not None) == output.ended
        self.last |= ends(outputs)

    def timing(self, id: str) -> Timing:
        timing = self.last[id].timing
        assert timing is not None
        return timing

    def at(self, now: float) -> Told:
        self.now = now
        return self


def test_the_parts_are_told_apart() -> None:
    d = Told()
    d.submit(make_request(max_tokens=2))
    d.at(2).launch()
    d.at(5).collect()
    d.at(6).launch()
    d.at(9).collect()
    assert d.timing("a") == Timing(2, 3, 4)
    assert d.timing("a").first_token_seconds == 5 and d.timing("a").seconds == 9


def test_a_first_token_that_is_the_last_ends_both_parts() -> None:
    d = Told()
    d.submit(make_request(max_tokens=1))
    d.at(1).launch()
    d.at(4).collect()
    assert d.timing("a") == Timing(1, 3, 0)


def test_a_prompt_in_chunks_is_prefill_until_its_token() -> None:
    d = Told(prefill_chunk=2)
    d.submit(make_request(prompt=(1, 2, 3, 4, 5), max_tokens=1))
    for now in (1, 2, 3):
        d.at(now).launch()
        d.collect()
    assert d.timing("a") == Timing(1, 2, 0)


def test_who_never_got_a_slot_only_queued() -> None:
    d = Told()
    d.submit(make_request("late", deadline=3.0))
    d.at(7).step()
    assert d.timing("late") == Timing(7, 0, 0)
    assert d.last["late"].account.output_tokens == 0  # type: ignore[union-attr]


def test_who_is_ended_while_its_prompt_runs_has_no_decode() -> None:
    d = Told()
    d.submit(make_request())
    d.at(1).launch()
    d.at(3)
    d.scheduler.finish("a", FinishReason.ABORT)
    d.collect()
    assert d.timing("a") == Timing(1, 2, 0)


def test_preemptions_are_counted_and_do_not_begin_a_time_anew() -> None:
    d = Told(make_spec(pages=9), prefix_caching=False)
    for number, id in enumerate("abc"):  # they outgrow the pages together
        d.submit(make_request(id, prompt=(number + 1,) * 4, max_tokens=20))
    while d.scheduler.unfinished or d.flights:
        d.at(d.now + 1).step()
    timings = [d.timing(id) for id in "abc"]
    assert sum(t.preemptions for t in timings) == d.scheduler.stats().preemptions > 0
    assert [t.seconds for t in timings] == [d.last[id].account.ended_at for id in "abc"]  # type: ignore[union-attr]
    assert all(t.first_token_seconds <= 3 for t in timings)


def test_several_answers_share_one_account() -> None:
    d = Told()
    d.submit(make_request(n=3, temperature=1.0, max_tokens=4, ignore_eos=True))
    d.run()
    account = d.last["a"].account
    assert account is not None and account.output_tokens == 12
    assert [len(tokens) for tokens in account.answers] == [7, 7, 7]
    assert [tuple(tokens[:3]) for tokens in account.answers] == [account.request.prompt] * 3


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedRunner(FakeRunner):
    """Each collect takes as long as the test says."""

    def __init__(self, clock: Clock, seconds: list[float]):
        super().__init__(SPEC)
        self.clock, self.left = clock, seconds

    def collect(self, handle):
        self.clock.now += self.left.pop(0)
        return super().collect(handle)


def _engine(clock: Clock, runner: FakeRunner, *, overlap: bool) -> tuple[Engine, dict]:
    told: dict[str, RequestOutput] = {}
    scheduler = Scheduler(SPEC, max_batched_tokens=32, prefill_chunk=32, clock=clock)
    engine = Engine(
        runner, scheduler, overlap=overlap, on_outputs=lambda outputs: told.update(ends(outputs))
    )
    return engine, told


def test_time_in_the_inbox_is_queue_time() -> None:
    clock = Clock()
    engine, told = _engine(clock, TimedRunner(clock, [1.0]), overlap=False)
    engine.submit(make_request(max_tokens=1))
    clock.now = 4.0
    engine.step()
    assert told["a"].timing == Timing(4, 1, 0)


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlap"])
def test_steps_are_timed_by_kind(overlap: bool) -> None:
    clock = Clock()
    seconds = [0.4, 0.02, 0.0042, 0.0041]
    runner = TimedRunner(clock, list(seconds))
    engine, _ = _engine(clock, runner, overlap=overlap)
    kinds: list[str] = []
    launch = runner.launch

    def noting(plan: StepPlan):
        mixed = plan.num_decode and plan.num_decode < plan.num_rows
        kinds.append("mixed" if mixed else "decode" if plan.num_decode else "prefill")
        return launch(plan)

    runner.launch = noting  # type: ignore[method-assign]
    engine.submit(make_request("a", max_tokens=4))
    engine.step()
    engine.submit(make_request("b", (7, 8), max_tokens=1))
    while engine.has_work:
        engine.step()
    assert set(kinds) == {"prefill", "mixed", "decode"}
    expected = dict.fromkeys(("prefill", "mixed", "decode"), 0.0)
    for kind, each in zip(kinds, seconds, strict=True):
        expected[kind] += each
    times = engine.step_times
    assert times.seconds == pytest.approx(expected)
    assert {kind: sum(counts) for kind, counts in times.counts.items()} == {
        kind: kinds.count(kind) for kind in expected
    }
    # 0.0042 lies above 0.003 and not above 0.005.
    at = STEP_BOUNDS.index(0.005)
    assert times.counts["decode"][at] == sum(
        kind == "decode" and each < 0.005 for kind, each in zip(kinds, seconds, strict=True)
    )
