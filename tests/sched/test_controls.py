"""Penalties, bias, allowed ids and bad words on their way to the device; k tokens a dispatch."""

from __future__ import annotations

import pytest
from driver import Driver
from fake_runner import make_request, make_spec

from quire.model.plan import Sampler

EACH = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 0.5},
    {"logit_bias": {3: 2.0, 7: -100.0}},
    {"allowed_token_ids": (4, 9, 2)},
    {"bad_words": ((4,), (1, 2), (9, 9, 9))},
]


@pytest.mark.parametrize("controls", EACH, ids=lambda controls: next(iter(controls)))
def test_controls_reach_the_device_and_run_in_programs_that_know_them(controls: dict) -> None:
    d = Driver(make_spec(), prefill_chunk=4)
    d.submit(
        request := make_request(prompt=(1, 2, 3, 4, 5, 6), max_tokens=12, **controls),
        plain := make_request("plain", (7, 8), max_tokens=3),
    )
    d.run()
    assert d.tokens["a"] == d.answer(request) and d.tokens["plain"] == d.answer(plain)
    assert d.tokens["a"] != d.answer(make_request(prompt=request.prompt, max_tokens=12))
    [sent] = [c for plan in d.plans for c in plan.controls]
    assert sent.prompt.tolist() == [1, 2, 3, 4, 5, 6] and sent.output.tolist() == []
    samplers = [plan.bucket.sampler for plan in d.plans]
    assert samplers[0] is Sampler.GREEDY  # nothing of it is emitted yet
    assert set(samplers[1:]) == {Sampler.FULL}


def test_after_a_preemption_the_device_hears_what_the_output_was() -> None:
    d = Driver(make_spec())
    request = make_request(max_tokens=9, frequency_penalty=0.5, bad_words=((5, 6, 7),), n=2)
    d.submit(request)
    for _ in range(4):
        d.step()
    d.preempt("a", 1)
    d.step()
    sent = d.plans[-1].controls
    assert [c.prompt.tolist() for c in sent] == [[1, 2, 3]]
    assert sent[0].output.tolist() == d.answer(request, 1)[:4]
    d.run()
    assert [d.choices["a", c] for c in (0, 1)] == [d.answer(request, c) for c in (0, 1)]


@pytest.mark.parametrize(
    "host_bound", [{"logprobs": 0}, {"presence_penalty": 1.0}, {"best_of": 2}, {"bad_words": [[1]]}]
)
def test_rows_with_controls_or_log_probabilities_decode_one_token_a_dispatch(
    host_bound: dict,
) -> None:
    d = Driver(make_spec(max_k=4))
    d.submit(a := make_request("a", max_tokens=20), make_request("b", max_tokens=4, **host_bound))
    d.run()
    assert d.tokens["a"] == d.answer(a)
    with_b = [plan for plan in d.plans if plan.bucket.sampler is Sampler.FULL]
    assert with_b and all(plan.k == 1 for plan in with_b)
    assert d.plans[-1].k == 4


def test_sampling_rows_decode_many_tokens_a_dispatch_and_choices_too() -> None:
    d = Driver(make_spec(max_k=4), depth=1)
    d.submit(request := make_request(max_tokens=17, temperature=1.0, min_tokens=3, n=3))
    d.run()
    for choice in range(3):
        assert d.choices["a", choice] == d.answer(request, choice)
    assert [plan.k for plan in d.plans] == [1, 4, 4, 4, 4]


def test_without_a_program_for_so_many_rows_one_token_a_dispatch() -> None:
    from quire.model.ladder import Bucket, Ladder

    spec = make_spec(slots=4, max_k=4)
    buckets = [b for b in spec.ladder.buckets if b.k == 1] + [Bucket(2, 2, Sampler.GREEDY, 4)]
    object.__setattr__(spec, "ladder", Ladder(buckets))
    d = Driver(spec)
    d.submit(*(make_request(id, max_tokens=6 * (n + 1)) for n, id in enumerate("abc")))
    d.run()
    assert {plan.k for plan in d.plans if plan.num_rows > 2} == {1}
    assert {plan.k for plan in d.plans if plan.num_rows <= 2 and plan.num_decode} == {4}
