"""When the next step is planned: late enough for those who come, early enough for the device."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from fake_runner import FakeRunner, make_request, make_spec

from quire.model.plan import Bucket, Sampler, StepPlan
from quire.sched.engine import Engine
from quire.sched.pacing import (
    FEW,
    IN_TIME,
    LATE,
    LEAST_LEAD,
    LONGEST,
    MARGIN,
    MOST_LEAD,
    RECENT,
    RESERVE,
    SHORTEST,
    Pacing,
)
from quire.sched.scheduler import Scheduler

BUCKET, OTHER = Bucket(64, 64, Sampler.GREEDY), Bucket(8, 8, Sampler.GREEDY)
PLENTY = 1.0
"""Seconds left of a step."""
HOST = 0.002
"""Seconds that the host always needs in these tests."""


def paced(*seconds: float, host: tuple[float, ...] = (HOST,) * 200) -> Pacing:
    pacing = Pacing()
    pacing.came(0.0)
    for each in host:
        pacing.planned(each)
    for each in seconds:
        pacing.took(BUCKET, each, PLENTY)
    return pacing


def before(usual: float, host: float = HOST) -> float:
    """When the next step is planned after the start of one."""
    return (1 - RESERVE) * usual - host - MARGIN


NEAR = 0.1 * HOST
"""What the estimate of the host's time may be off by, which steps by a tenth at most."""


def test_the_next_step_is_planned_as_late_as_the_host_can() -> None:
    pacing = paced(0.02)
    assert pacing.wait(BUCKET, FEW, 0.5, 0.5) == pytest.approx(before(0.02), abs=NEAR)
    now = pacing.wait(BUCKET, FEW, 0.5, 0.5)
    assert pacing.wait(BUCKET, FEW, 0.5, 0.51) == pytest.approx(now - 0.01)
    assert pacing.wait(OTHER, FEW, 0.5, 0.5) <= 0  # which nobody knows


def test_short_steps_and_those_of_few_rows_are_not_waited_in() -> None:
    assert paced(SHORTEST).wait(BUCKET, FEW, 0.5, 0.5) > 0
    assert paced(SHORTEST * 0.99).wait(BUCKET, FEW, 0.5, 0.5) <= 0
    assert paced(0.02).wait(BUCKET, FEW - 1, 0.5, 0.5) <= 0


def test_what_is_usual_falls_at_once_and_rises_slowly() -> None:
    def after(*seconds: float) -> float:
        return paced(*seconds).wait(BUCKET, FEW, 0, 0)

    assert after(0.02, 0.01) == after(0.01)
    assert after(0.01) < after(0.01, 0.02) < after(0.011)
    assert after(0.01, *[0.02] * 99) == after(0.02)
    assert after(9.0) < LONGEST  # it hung


def test_a_step_that_was_over_unseen_counts_as_shorter_than_it_seemed() -> None:
    pacing = paced(0.02)
    planned = pacing.wait(BUCKET, FEW, 0, 0)
    pacing.took(BUCKET, 0.019, LATE / 2)  # the next was launched too late
    assert pacing.wait(BUCKET, FEW, 0, 0) < planned - 0.003
    alone = paced(0.02)  # planned at once, and late all the same: it says nothing of the wait
    alone.took(BUCKET, 0.019, LATE / 2)
    assert alone.wait(BUCKET, FEW, 0, 0) == paced(0.019).wait(BUCKET, FEW, 0, 0)
    alone = paced(0.02)
    alone.took(BUCKET, 0.03, LATE / 2)
    assert alone.wait(BUCKET, FEW, 0, 0) == paced(0.02).wait(BUCKET, FEW, 0, 0)


def idle_share(steps: list[float], pacing: Pacing) -> float:
    """Of a device whose steps take so long, all of one bucket, with an engine that waits as it is
    told and needs HOST for each."""
    now, idle = 0.0, 0.0  # now: the device begins with a step
    for seconds in steps:
        pacing.came(now)
        launched = now + max(0.0, pacing.wait(BUCKET, FEW, now, now)) + HOST
        pacing.planned(HOST)
        end = now + seconds
        seen = max(end, launched)
        idle += seen - end
        pacing.took(BUCKET, seen - now, max(0.0, end - launched))
        now = seen
    return idle / now


def test_steps_of_unlike_length_leave_the_device_little_to_wait_for() -> None:
    draw = np.random.default_rng(0)
    usual = 0.02
    assert idle_share([usual] * 500, Pacing()) < 0.001
    assert idle_share([*usual * draw.uniform(0.6, 1.5, 2000)], Pacing()) < 0.02
    assert idle_share([0.024, 0.024, 0.024, 0.012] * 500, Pacing()) < 0.03
    assert idle_share([0.03] * 7 + [0.015] * 500, Pacing()) < 0.01  # shorter for good


def test_nearly_all_steps_are_planned_in_time() -> None:
    drawn = np.random.default_rng(0).lognormal(np.log(HOST), 0.4, 20_000)
    pacing, late = Pacing(), 0
    pacing.came(0.0)
    pacing.took(BUCKET, LONGEST, PLENTY)
    for n, seconds in enumerate(drawn):
        left = (1 - RESERVE) * LONGEST - MARGIN - pacing.wait(BUCKET, FEW, 0, 0)
        late += n >= 1000 and seconds > left
        pacing.planned(float(seconds))
    assert late / (len(drawn) - 1000) == pytest.approx(1 - IN_TIME, abs=0.01)


def test_the_time_that_a_host_needs_has_bounds() -> None:
    slow, fast = paced(LONGEST, host=(9.0,) * 999), paced(LONGEST, host=(0.0,) * 999)
    assert slow.wait(BUCKET, FEW, 0, 0) == pytest.approx(before(LONGEST, MOST_LEAD))
    assert fast.wait(BUCKET, FEW, 0, 0) == pytest.approx(before(LONGEST, LEAST_LEAD))


def test_no_step_is_taken_to_last_longer_than_the_longest() -> None:
    assert paced(*[9.0] * 99).wait(BUCKET, FEW, 0, 0) <= LONGEST


def test_where_nobody_comes_nobody_is_waited_for() -> None:
    pacing = paced(0.02)
    assert pacing.wait(BUCKET, FEW, RECENT, RECENT) > 0
    assert pacing.wait(BUCKET, FEW, RECENT, RECENT + 1e-6) <= 0
    pacing.came(RECENT)
    assert pacing.wait(BUCKET, FEW, RECENT, RECENT + 1e-6) > 0
    fresh = Pacing()
    fresh.took(BUCKET, 0.02, PLENTY)
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

        def planned(self, seconds: float) -> None:
            planned.append(seconds)

    planned: list[float] = []
    plans = run(3, Heard())
    assert went[:2] == [(OTHER, True)] * 2
    assert went[2:] == [(plan.bucket, True) for plan in plans[:5]]
    assert len(planned) == len(plans) and min(planned) >= 0
