"""Requests of several choices: shared pages, one end, one place in the queue."""

from __future__ import annotations

import pytest
from driver import Driver
from fake_runner import expected_scores, make_request, make_spec

from quire.errors import DeadlineExceeded, Internal
from quire.sched.request import FinishReason


def prompt(first: int, count: int) -> tuple[int, ...]:
    return tuple((first + n) % 50 for n in range(count))


def check_choices(d: Driver, request) -> None:
    for choice in range(request.sampling.choices):
        assert d.choices[request.id, choice] == d.answer(request, choice)
        assert d.choice_ends[request.id, choice].finish_reason is FinishReason.LENGTH
    assert request.id in d.ended


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("depth", [0, 1])
def test_choices_compute_the_prompt_once_and_differ(depth: int, caching: bool) -> None:
    d = Driver(make_spec(), depth=depth, prefill_chunk=6, prefix_caching=caching)
    d.submit(request := make_request(prompt=prompt(0, 14), max_tokens=6, n=3))
    d.run()
    check_choices(d, request)
    assert len({tuple(tokens) for tokens in d.choices.values()}) == 3
    # Pages of four: the first choice computes all 14 tokens, the others the last two each.
    assert sum(len(plan.prompt_tokens) for plan in d.plans) == 14 + 2 + 2
    assert {init.choice for plan in d.plans for init in plan.inits} == {0, 1, 2}
    stats = d.scheduler.stats()
    assert (stats.finished, stats.prompt_tokens, stats.output_tokens) == (1, 14, 18)
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (14, 0)
    assert stats.pages_used == 0 and (stats.pages_cached > 0) == caching


def test_without_prefix_caching_only_choices_of_one_request_share() -> None:
    d = Driver(make_spec(slots=4), prefix_caching=False)
    requests = [make_request(id, prompt(0, 9), max_tokens=5, n=2) for id in "ab"]
    d.submit(*requests, make_request("c", prompt(0, 9)))
    d.run()
    for request in requests:
        check_choices(d, request)
    prompts = [len(plan.prompt_tokens) for plan in d.plans]
    assert sum(prompts) == 2 * (9 + 1) + 9
    assert d.scheduler.stats().pages_cached == 0


def peak_pages(d: Driver) -> int:
    peak = 0
    while d.scheduler.unfinished or d.flights:
        d.step()
        peak = max(peak, d.scheduler.stats().pages_used)
    return peak


def test_eight_choices_use_less_than_half_the_pages_of_eight_requests() -> None:
    """Issue 3: n = 8 over a 1,000-token prompt, at most 45 % of the pages."""
    spec = make_spec(slots=8, pages=1000, page_size=16, max_model_len=1280, tokens=512)
    text = prompt(0, 1000)

    def driver() -> Driver:
        return Driver(spec, depth=1, max_batched_tokens=512, prefill_chunk=512)

    together, apart = driver(), driver()
    together.submit(request := make_request("n", text, 256, n=8))
    for i in range(8):
        apart.submit(make_request(str(i), text, 256, seed=i, cache_salt=str(i)))
    shared, separate = peak_pages(together), peak_pages(apart)
    check_choices(together, request)
    print(f"n = 8: {shared} pages; eight requests: {separate}; {shared / separate:.1%}")
    assert separate > 8 * 78
    assert shared <= 0.45 * separate


def test_a_request_waits_in_one_place_and_its_choices_go_before_later_arrivals() -> None:
    d = Driver(make_spec(slots=2), max_queue=2)
    d.submit(a := make_request("a", max_tokens=6, n=5), b := make_request("b", max_tokens=2))
    assert d.scheduler.stats().waiting == 2
    d.step()
    assert (d.scheduler.stats().running, d.scheduler.stats().waiting) == (2, 2)
    d.run()
    check_choices(d, a), check_choices(d, b)
    assert list(d.choices) == [*(("a", c) for c in range(5)), ("b", 0)]


@pytest.mark.parametrize("depth", [0, 1])
def test_a_choice_ends_alone(depth: int) -> None:
    d = Driver(make_spec(), depth=depth)
    d.submit(request := make_request(max_tokens=12, n=3))
    for _ in range(3):
        d.step()
    d.scheduler.finish("a", FinishReason.STOP, 1)
    d.scheduler.finish("a", FinishReason.STOP, 1)
    d.scheduler.finish("a", FinishReason.STOP, 7)
    d.step()
    assert d.choice_ends["a", 1].finish_reason is FinishReason.STOP and "a" not in d.ended
    d.run()
    assert d.choices["a", 0] == d.answer(request) and d.choices["a", 2] == d.answer(request, 2)
    assert len(d.choices["a", 1]) < 12 and "a" in d.ended


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_an_abort_ends_all_choices_begun_or_not(steps: int) -> None:
    d = Driver(make_spec(slots=2), depth=1, prefill_chunk=3)
    d.submit(make_request(prompt=prompt(0, 5), max_tokens=20, n=4))
    for _ in range(steps):
        d.step()
    d.scheduler.finish("a")
    d.run()
    assert {key: end.finish_reason for key, end in d.choice_ends.items()} == {
        ("a", choice): FinishReason.ABORT for choice in range(4)
    }
    assert [end.ended for end in d.choice_ends.values()] == [False] * 3 + [True]
    assert d.scheduler.stats().pages_used == 0


def test_a_deadline_ends_all_choices_with_one_error() -> None:
    d = Driver(make_spec(slots=2))
    d.submit(make_request(max_tokens=20, n=3, deadline=2.0))
    for _ in range(3):
        d.step()
    d.now = 3.0
    d.run()
    [end] = d.choice_ends.values()
    assert end.ended and isinstance(end.error, DeadlineExceeded)
    assert "of at most 60 output tokens" in str(end.error)


def test_a_bad_row_or_a_lost_device_ends_the_request_once() -> None:
    d = Driver(make_spec(), depth=1)
    d.submit(make_request(max_tokens=20, n=3), good := make_request("good", prompt(7, 5)))
    d.step()
    d.step()
    d.runner.poisoned_slots.add(d.seq("a", 1).slot)
    d.run()
    assert isinstance(d.ends["a"].error, Internal) and d.tokens["good"] == d.answer(good)

    d = Driver(make_spec(slots=3))
    d.submit(request := make_request(max_tokens=8, n=3))
    for steps in (3, 2):
        for _ in range(steps):
            d.step()
        d.runner.reset()
        d.scheduler.requeue_all(RuntimeError("gone"))
        d.hear(d.scheduler.take_outputs())
        d.scheduler.check_integrity()
    assert isinstance(d.ends["a"].error, Internal) and "a" in d.ended
    assert d.choices["a", 1] == d.answer(request, 1)[: len(d.choices["a", 1])]


def test_choices_survive_preemption() -> None:
    d = Driver(make_spec(pages=13, max_model_len=32), depth=1)
    d.submit(request := make_request(prompt=prompt(0, 9), max_tokens=20, n=4))
    d.run()
    check_choices(d, request)
    assert d.scheduler.stats().preemptions > 0


def test_ranked_choices_bring_log_probabilities() -> None:
    d = Driver(make_spec())
    d.submit(make_request(max_tokens=1, best_of=2, n=1), make_request("b", max_tokens=1, n=2))
    d.run()
    for choice in range(2):
        end = d.choice_ends["a", choice]
        assert end.logprobs is not None and end.logprobs[0].top == ()
        assert d.choice_ends["b", choice].logprobs is None


# ---- log-probabilities of the prompt


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("chunk", [3, 4, 32])
def test_each_prompt_token_is_scored_once_whatever_the_chunks(chunk: int, depth: int) -> None:
    d = Driver(make_spec(), depth=depth, prefill_chunk=chunk)
    text = prompt(0, 10)
    d.submit(make_request("before", text))
    d.run()
    d.submit(request := make_request("a", text, max_tokens=5, prompt_logprobs=2, n=2))
    d.run()
    assert d.scores == {"a": expected_scores(request)}
    check_choices(d, request)
    assert d.ends["a"].cached_tokens == 0  # all of it had to be computed
    d.submit(make_request("after", text))
    d.run()
    assert d.ends["after"].cached_tokens == 8


def test_prompt_scores_come_with_the_first_token_and_their_alternatives() -> None:
    d = Driver(make_spec())
    d.submit(make_request("a", (5, 6, 7), max_tokens=3, prompt_logprobs=2))
    d.submit(make_request("b", (5,), max_tokens=1, prompt_logprobs=0))
    plan, handle = d.scheduler.schedule(), None
    assert plan is not None
    handle = d.runner.launch(plan)
    a, b = d.scheduler.update(plan, d.runner.collect(handle))
    assert a.prompt_logprobs is not None and a.logprobs is None
    nothing, first, second = a.prompt_logprobs
    assert nothing is None and (first.token, second.token) == (6, 7)
    assert first.top == ((0, 0.0), (1, -1.0)) and first.rank == 7
    assert b.prompt_logprobs == (None,)


def test_scores_are_kept_over_a_preemption_in_the_middle_of_the_prompt() -> None:
    d = Driver(make_spec(page_size=2), prefill_chunk=5)
    d.submit(request := make_request(prompt=prompt(0, 14), max_tokens=4, prompt_logprobs=0))
    d.step()
    d.preempt("a")
    plan = d.step()
    assert plan is not None and plan.starts.tolist() == [4]  # 5 are known, of which 2 pages full
    d.run()
    assert d.scores["a"] == expected_scores(request) and d.tokens["a"] == d.answer(request)


def test_scores_that_are_not_numbers_fail_the_request() -> None:
    d = Driver(make_spec(), prefill_chunk=4)
    d.submit(make_request(prompt=prompt(0, 9), prompt_logprobs=0))
    d.launch()
    d.flights[0][1].scored[0].chosen[1] = float("nan")
    d.collect()
    assert isinstance(d.ends["a"].error, Internal) and d.scheduler.stats().pages_cached == 0
