"""Requests for embeddings: one output, with the prompt's pooled hidden state and no tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from driver import Driver
from fake_runner import DeviceFault, expected_embedding, make_request, make_spec

from quire.errors import Internal, InvalidRequest
from quire.model.plan import Emit
from quire.sched.request import FinishReason, RequestOutput


def prompt(first: int, count: int) -> tuple[int, ...]:
    return tuple((first + i) % 50 for i in range(count))


def embedding(end: RequestOutput) -> list[float]:
    assert end.finish_reason is FinishReason.STOP and end.ended and end.error is None
    assert not end.tokens and end.pooled is not None and end.pooled.dtype == np.float32
    return end.pooled.tolist()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("chunk", [3, 32])
def test_embeddings_beside_answers(depth: int, chunk: int) -> None:
    d = Driver(make_spec(), depth=depth, prefill_chunk=chunk)
    prompts = {"p": prompt(0, 10), "q": prompt(5, 1), "r": prompt(0, 16)}
    answers = [make_request(f"a{i}", prompt(9, 6 + i), max_tokens=5) for i in range(2)]
    d.submit(answers[0], *(make_request(n, p, pooled=True) for n, p in prompts.items()), answers[1])
    d.run()
    for name, tokens in prompts.items():
        assert embedding(d.ends[name]) == expected_embedding(tokens).tolist()
    assert [d.tokens[a.id] for a in answers] == [d.answer(a) for a in answers]
    emits = [emit for plan in d.plans for emit in plan.emits.tolist()]
    assert emits.count(Emit.POOLED) == len(prompts)
    assert d.scheduler.stats().output_tokens == 10


def test_a_known_prefix_is_found_and_the_last_token_computed() -> None:
    d = Driver(make_spec())
    d.submit(make_request("a", prompt(0, 12), max_tokens=2))
    d.run()
    d.submit(make_request("b", prompt(0, 12), pooled=True))
    d.run()
    assert d.ends["b"].cached_tokens == 8
    assert embedding(d.ends["b"]) == expected_embedding(prompt(0, 12)).tolist()


def test_who_gave_way_starts_over() -> None:
    d = Driver(make_spec(pages=9), prefill_chunk=4)
    d.submit(make_request("a", prompt(0, 4), max_tokens=20))
    for _ in range(3):
        d.step()
    d.submit(make_request("b", prompt(20, 18), pooled=True))
    d.run()
    assert embedding(d.ends["b"]) == expected_embedding(prompt(20, 18)).tolist()


def test_after_a_device_fault_it_is_computed_again() -> None:
    d = Driver(make_spec())
    d.runner.fail_launch = (0,)
    d.submit(make_request("a", prompt(0, 6), pooled=True))
    with pytest.raises(DeviceFault):
        d.step()
    d.runner.reset()
    d.scheduler.requeue_all(DeviceFault("launch"))
    d.run()
    assert embedding(d.ends["a"]) == expected_embedding(prompt(0, 6)).tolist()


def test_one_that_is_not_finite_fails_alone() -> None:
    d = Driver(make_spec(), depth=1)
    d.submit(make_request("bad", prompt(0, 6), pooled=True), good := make_request("good"))
    plan = d.launch()
    assert plan is not None
    pooled = d.flights[0][1].pooled
    pooled[0, 1] = np.nan
    d.run()
    error = d.ends["bad"].error
    assert isinstance(error, Internal) and "held an inf or NaN" in str(error)
    assert d.tokens["good"] == d.answer(good)


def test_bad_kv_is_forgotten_even_if_nobody_waits_any_more() -> None:
    d = Driver(make_spec(), depth=1)
    d.submit(make_request("bad", prompt(0, 9), pooled=True))
    d.launch()
    d.flights[0][1].pooled[:] = np.nan
    d.scheduler.finish("bad")
    d.run()
    assert d.scheduler.stats().pages_cached == 0


def test_prompts_may_be_as_long_as_the_context() -> None:
    """One token longer than a prompt that is to be answered, which needs room for the answer."""
    for spec, most in ((make_spec(max_model_len=24), 24), (make_spec(pages=6), 20)):
        d = Driver(spec)
        d.submit(make_request("a", prompt(0, most), pooled=True))
        d.run()
        assert embedding(d.ends["a"]) == expected_embedding(prompt(0, most)).tolist()
        with pytest.raises(InvalidRequest, match=f"prompt: got {most + 1} .* at most {most} "):
            d.submit(make_request("a", prompt(0, most + 1), pooled=True))


def test_there_is_nothing_to_choose() -> None:
    request, sampled = make_request("a", pooled=True), make_request("a", temperature=0.5)
    with pytest.raises(InvalidRequest, match=r"sampling: got .* POOLED_SAMPLING"):
        Driver(make_spec()).submit(replace(request, sampling=sampled.sampling))
