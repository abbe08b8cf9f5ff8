"""When the next step is planned: late enough for those who come, early enough for the device."""

from __future__ import annotations

from collections import deque

import pytest
from fake_runner import FakeRunner, make_request, make_spec

from quire.model.plan import Bucket, Sampler, StepPlan
from quire.sched.engine import Engine
from quire.sched.pacing import (
    FEW,
    LATE,
    LEAST_LEAD,
    LONGEST,
    MOST_LEAD,
    RECENT,
    RESERVE,
    SHORTEST,
    Pacing,
)
from quire.sched.scheduler import Scheduler

BUCKET, OTHER = Bucket(64, 64, Sampler.GREEDY), Bucket(8, 8, Sampler.GREEDY)
LEFT = 1.0  # plenty


def paced(*seconds: float, left: float = LEFT) -> Pacing:
    pacing = Pacing()
    pacing.came(0.0)
    for each in seconds:
        pacing.took(BUCKET, each, left)
    return pacing


def test_a_part_of_the_usual_time_is_kept_in_reserve() -> None:
    pacing = paced(0.02)
    assert pacing.wait(BUCKET, FEW, 0.5, 0.5) == pytest.approx(0.02 * (1 - RESERVE))
    assert pacing.wait(BUCKET, FEW, 0.5, 0.51) == pytest.approx(0.02 * (1 - RESERVE) - 0.01)
    assert pacing.wait(OTHER, FEW, 0.5, 0.5) <= 0  # which nobody knows


def test_short_steps_and_those_of_few_rows_are_not_waited_in() -> None:
    assert paced(SHORTEST).wait(BUCKET, FEW, 0.5, 0.5) > 0
    assert paced(SHORTEST * 0.99).wait(BUCKET, FEW, 0.5, 0.5) <= 0
    assert paced(0.02).wait(BUCKET, FEW - 1, 0.5, 0.5) <= 0


def test_what_is_usual_falls_at_once_and_rises_slowly() -> None:
    assert paced(0.02, 0.01).wait(BUCKET, FEW, 0, 0) == pytest.approx(0.0075)
    assert paced(0.01, 0.02).wait(BUCKET, FEW, 0, 0) == pytest.approx(0.0075 * 1.05)
    assert paced(0.01, *[0.02] * 99).wait(BUCKET, FEW, 0, 0) == pytest.approx(0.015)
    assert paced(9.0).wait(BUCKET, FEW, 0, 0) < LONGEST  # it hung


def test_being_late_teaches_to_plan_earlier() -> None:
    usual = 0.008
    begun = paced(usual, usual, left=LATE / 2)
    assert begun.wait(BUCKET, FEW, 0, 0) == pytest.approx(usual - LEAST_LEAD * 1.5**2)
    worst = paced(*[usual] * 99, left=0.0)
    assert worst.wait(BUCKET, FEW, 0, 0) == pytest.approx(usual - MOST_LEAD)
    for _ in range(2000):
        worst.took(BUCKET, usual, LEFT)
    assert worst.wait(BUCKET, FEW, 0, 0) == pytest.approx(usual * (1 - RESERVE))


def test_reading_results_that_waited_is_no_time_left() -> None:
    usual = 0.008
    late = paced(usual, usual, left=usual / 10)
    assert late.wait(BUCKET, FEW, 0, 0) < paced(usual, usual).wait(BUCKET, FEW, 0, 0) - 1e-4


def test_short_steps_teach_nothing_about_being_late() -> None:
    pacing = paced(0.02)
    for _ in range(99):
        pacing.took(OTHER, SHORTEST * 0.9, 0.0)
    assert pacing.wait(BUCKET, FEW, 0, 0) == pytest.approx(0.02 * (1 - RESERVE))


def test_no_step_is_taken_to_last_longer_than_the_longest() -> None:
    assert paced(*[9.0] * 99).wait(BUCKET, FEW, 0, 0) <= LONGEST


def test_where_nobody_comes_nobody_is_waited_for() -> None:
    pacing = paced(0.02)
    assert pacing.wait(BUCKET, FEW, RECENT, RECENT) > 0
    assert pacing.wait(BUCKET, FEW, RECENT, RECENT + 1e-6) <= 0
    pacing.came(RECENT)
    assert pacing.wait(BUCKET, FEW, RECENT, RECENT + 1e-6) > 0
    fresh = Pacing()
    fresh.took(BUCKET, 0.02, LEFT)
    assert fresh.wait(BUCKET, FEW, 0.0, 0.0) <= 0


class Told(Pacing):
    """While it is asked, somebody comes."""

    def __init__(self, *come: str):
        super().__init__()
        self.come = deque(come)
        self.asked = 0

    def wait(self, bucket: Bucket, rows: int, begun: float, now: float) -> float:
        self.asked += 1
        if self.come:
            self.engine.submit(make_request(self.come.popleft(), max_tokens=30))
        return 0.0

    engine: Engine


def run(slots: int, pacing: Told, overlap: bool = True) -> list[StepPlan]:
    spec, plans = make_spec(slots=slots, max_model_len=64), []
    runner = FakeRunner(spec)
    launch = runner.launch

    def seen(plan: StepPlan) -> object:
        plans.append(plan)
        return launch(plan)

    runner.launch = seen  # type: ignore[method-assign, assignment]
    scheduler = Scheduler(spec, max_batched_tokens=32, prefill_chunk=32)
    pacing.engine = engine = Engine(
        runner, scheduler, overlap=overlap, on_outputs=lambda _: None, pacing=pacing
    )
    for at in range(slots - 1):
        engine.submit(make_request(str(at), max_tokens=30))
    for _ in range(6):
        engine.step()
    return plans


def test_who_comes_during_the_wait_is_in_the_next_step() -> None:
    plans = run(3, Told("late"))
    assert [plan.num_rows for plan in plans[:3]] == [2, 3, 3]
    assert plans[1].num_decode == 2


def test_nobody_is_waited_for_while_others_queue() -> None:
    pacing = Told("takes the last slot", "queues")
    run(3, pacing)
    assert pacing.asked == 2  # and never once somebody queues


def test_in_turn_there_is_nothing_to_wait_for() -> None:
    pacing = Told()
    run(3, pacing, overlap=False)
    assert pacing.asked == 0


def test_the_engine_says_how_steps_went() -> None:
    went: list[tuple[Bucket, bool]] = []

    class Heard(Told):
        def came(self, now: float) -> None:
            went.append((OTHER, True))

        def took(self, bucket: Bucket, seconds: float, left: float) -> None:
            went.append((bucket, 0 <= left <= seconds))

    plans = run(3, Heard())
    assert went[:2] == [(OTHER, True)] * 2
    assert went[2:] == [(plan.bucket, True) for plan in plans[:5]]
