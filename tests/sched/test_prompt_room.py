"""How much of a step prompts may fill, of tenants that have had more than others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from driver import Driver
from fake_runner import make_request, make_spec

from quire.model.ladder import make_ladder
from quire.model.plan import StepPlan

MOST = 16
"""Tokens of a step for a tenant that is ahead: four slots."""


def prompt_of(n: int, length: int = 60) -> tuple[int, ...]:
    return (n, *range(2, length + 1))


def served(*, ahead: str = "flood", priority: int = 0) -> Driver:
    """An answer of each of two tenants is in the making; one of them has had more."""
    d = Driver(
        make_spec(slots=4, pages=200, max_model_len=200, tokens=64, vocab=200),
        max_batched_tokens=64,
        prefill_chunk=64,
    )
    d.submit(make_request("f0", (1, 1), 100, tenant="flood", priority=priority))
    d.submit(make_request("o0", (2, 2), 100, tenant="other", priority=priority))
    d.step()
    d.scheduler._roster.waiting.tenants[ahead].charge(10_000)
    return d


def tokens_of(d: Driver, plan: StepPlan | None) -> dict[str, int]:
    """Tokens of a step, by request."""
    assert plan is not None
    slots = {seq.slot: seq.id for seq in d.scheduler._roster.running}
    return dict(zip((slots[s] for s in plan.slots.tolist()), plan.counts.tolist(), strict=True))


def test_long_prompts_of_who_is_ahead_fill_a_part_of_a_step() -> None:
    d = served()
    d.submit(request := make_request("f1", prompt_of(3), 5, tenant="flood"))
    assert tokens_of(d, d.step()) == {"f0": 1, "o0": 1, "f1": MOST - 2}
    assert tokens_of(d, d.step()) == {"f0": 1, "o0": 1, "f1": MOST - 2}
    d.submit(make_request("f2", prompt_of(4), 5, tenant="flood"))
    assert tokens_of(d, d.step()) == {"f0": 1, "o0": 1, "f1": MOST - 2}
    d.run(2000)
    assert d.tokens["f1"] == d.answer(request)


def test_who_is_not_ahead_may_fill_all_of_it() -> None:
    d = served(ahead="other")
    d.submit(make_request("f1", prompt_of(3), 5, tenant="flood"))
    assert tokens_of(d, d.step()) == {"f0": 1, "o0": 1, "f1": 60}


def test_so_may_who_is_ahead_once_nobody_else_is_served() -> None:
    d = served()
    d.submit(make_request("f1", prompt_of(3), 5, tenant="flood"))
    d.step()
    d.scheduler.finish("o0")
    assert tokens_of(d, d.step()) == {"f0": 1, "f1": 60 - (MOST - 2)}


@pytest.mark.parametrize(("priority", "tokens"), [(0, MOST - 2), (-1, 60)])
def test_a_better_priority_goes_before(priority: int, tokens: int) -> None:
    d = served()
    d.submit(make_request("f1", prompt_of(3), 5, tenant="flood", priority=priority))
    assert tokens_of(d, d.step())["f1"] == tokens


def test_who_is_served_with_a_better_priority_counts() -> None:
    d = served(priority=-1)
    d.submit(make_request("f1", prompt_of(3), 5, tenant="flood"))
    assert tokens_of(d, d.step())["f1"] == MOST - 2


def test_a_newcomers_prompt_has_room_beside_a_long_one() -> None:
    d = served()
    d.scheduler.finish("o0")
    d.submit(*(make_request(f"f{n}", prompt_of(n, 150), 5, tenant="flood") for n in (3, 4)))
    assert tokens_of(d, d.step()) == {"f0": 1, "f3": 63}
    d.submit(make_request("new", (9, 9, 9), 5, tenant="new"))
    assert tokens_of(d, d.step()) == {"f0": 1, "f3": MOST - 1, "new": 3}


@pytest.mark.parametrize(
    ("weights", "most"),
    [({"other": 4.0}, 10), ({"flood": 3.0}, 32), ({"flood": 7.0}, 2 + 55)],
)
def test_the_part_goes_by_weight(weights: dict[str, float], most: int) -> None:
    d = served()
    d.scheduler.set_weights(weights)
    d.submit(make_request("f1", prompt_of(3, 150), 5, tenant="flood"))
    assert tokens_of(d, d.step())["f1"] == most - 2


def test_few_slots_do_not_make_prompts_slow() -> None:
    d = Driver(
        make_spec(slots=2, pages=200, max_model_len=200, tokens=64, vocab=200),
        max_batched_tokens=64,
        prefill_chunk=64,
    )
    d.submit(make_request("o0", (2, 2), 100, tenant="other"))
    d.submit(make_request("f0", prompt_of(3, 150), 5, tenant="flood"))
    d.scheduler._roster.waiting.tenants["flood"].charge(10_000)
    assert tokens_of(d, d.step()) == {"o0": 2, "f0": 64 // 4 - 2}


def test_who_is_ahead_of_the_least_served_alone_does_not_queue_behind_a_flood() -> None:
    d = served()
    d.submit(make_request("f1", prompt_of(3, 150), 5, tenant="flood"))
    assert tokens_of(d, d.step()) == {"f0": 1, "o0": 1, "f1": MOST - 2}
    d.submit(make_request("x", (9, 9, 9), 5, tenant="between"))
    between = d.scheduler._roster.get("x")
    assert between is not None
    between.tenant.time = d.scheduler._roster.waiting.tenants["other"].time + 100
    assert tokens_of(d, d.step())["x"] == 3


def test_who_waits_for_a_slot_in_vain_makes_no_step_shorter() -> None:
    d = Driver(
        make_spec(slots=2, pages=200, max_model_len=200, tokens=64, vocab=200),
        max_batched_tokens=64,
        prefill_chunk=64,
    )
    d.submit(make_request("f0", (1, 1), 100, tenant="flood"))
    d.submit(make_request("f1", prompt_of(3, 150), 5, tenant="flood"))
    d.step()
    d.submit(make_request("new", (9, 9, 9), 100, tenant="new"))
    d.scheduler._roster.waiting.tenants["flood"].charge(200)  # too little to lose a place
    assert tokens_of(d, d.step()) == {"f0": 1, "f1": 63}


@pytest.mark.parametrize("slots", [16, 256, 1024])
def test_however_many_slots_a_newcomers_prompt_waits_for_no_long_one(slots: int) -> None:
    spec = make_spec(slots=slots, pages=9000, max_model_len=8192)
    d = Driver(
        replace(spec, ladder=make_ladder(slots, 2048)),
        max_batched_tokens=2048,
        prefill_chunk=2048,
    )
    d.submit(make_request("f0", (1, 1), 100, tenant="flood"))
    d.submit(make_request("o0", (2, 2), 100, tenant="other"))
    d.step()
    d.submit(*(make_request(f"f{n}", (n,) * 8000, 5, tenant="flood") for n in (3, 4)))
    d.step()
    d.submit(make_request("new", (9,) * 100, 5, tenant="new"))
    assert tokens_of(d, d.step())["new"] == 100
