"""Each rule of the scheduler, one by one. test_traces.py has them all at once."""

import numpy as np
import pytest
from driver import Driver
from fake_runner import make_request, make_spec

from quire.errors import DeadlineExceeded, Internal, InvalidRequest, Overloaded
from quire.kv.cache import KVCache
from quire.model.plan import Emit, Sampler
from quire.sched.policy import decode_tokens
from quire.sched.request import FinishReason


def prompt(first: int, count: int) -> tuple[int, ...]:
    return tuple((first + n) % 50 for n in range(count))


# ---- batching


def test_a_prompt_runs_in_chunks_and_the_last_one_emits() -> None:
    d = Driver(make_spec(), prefill_chunk=4)
    d.submit(request := make_request(prompt=prompt(0, 9), max_tokens=3))
    d.run()
    assert [plan.counts.tolist() for plan in d.plans] == [[4], [4], [1], [1], [1]]
    assert [plan.num_decode for plan in d.plans] == [0, 0, 0, 1, 1]
    assert [plan.emits[0] for plan in d.plans] == [Emit.NONE] * 2 + [Emit.TOKEN] * 3
    assert [plan.starts[0] for plan in d.plans] == [0, 4, 8, 9, 10]
    assert d.tokens["a"] == d.answer(request)
    assert d.ends["a"].finish_reason is FinishReason.LENGTH


def test_decode_rows_come_first_and_prompts_share_what_is_left() -> None:
    d = Driver(make_spec(tokens=10), max_batched_tokens=10)
    d.submit(make_request("a", max_tokens=20))
    d.step()
    d.submit(make_request("b", prompt(5, 12)), make_request("c", prompt(9, 12)))
    plan = d.step()
    assert plan is not None
    assert (plan.num_decode, plan.counts.tolist()) == (1, [1, 9])
    plan = d.step()
    assert plan is not None
    assert (plan.num_decode, plan.counts.tolist()) == (1, [1, 3, 6])
    assert plan.emits.tolist() == [Emit.TOKEN, Emit.TOKEN, Emit.NONE]


def test_priority_goes_before_arrival() -> None:
    d = Driver(make_spec(slots=1))
    d.submit(
        make_request("low", priority=1), make_request("first"), make_request("second", max_tokens=1)
    )
    d.run()
    assert list(d.ends) == ["first", "second", "low"]


def test_the_sampler_of_a_step_is_the_richest_that_an_emitting_row_needs() -> None:
    d = Driver(make_spec(), prefill_chunk=4)
    d.submit(
        make_request("a", max_tokens=20),
        make_request("b", prompt(1, 8), temperature=1.0),
        make_request("c", prompt(2, 12), max_tokens=2, logprobs=2),
    )
    samplers = [d.step().bucket.sampler for _ in range(5)]  # type: ignore[union-attr]
    assert samplers == [
        Sampler.GREEDY,  # b and c are in the middle of their prompts
        Sampler.SAMPLE,
        Sampler.FULL,
        Sampler.FULL,
        Sampler.SAMPLE,
    ]


def test_logprobs_come_with_their_tokens_for_those_who_asked() -> None:
    d = Driver(make_spec())
    d.submit(make_request("a", logprobs=2, max_tokens=1), make_request("b", max_tokens=1))
    d.run()
    end = d.ends["a"]
    assert end.logprobs is not None
    [entry] = end.logprobs
    assert (entry.token, entry.logprob) == (end.tokens[0], -float(end.tokens[0]))
    assert entry.rank == end.tokens[0] + 1
    assert entry.top == ((0, 0.0), (1, -1.0))
    assert d.ends["b"].logprobs is None


def test_many_tokens_a_dispatch_only_while_nobody_waits() -> None:
    d = Driver(make_spec(slots=1, max_k=4))
    d.submit(make_request("a", max_tokens=20))
    assert [d.step().k for _ in range(2)] == [1, 4]  # type: ignore[union-attr]
    d.submit(make_request("b"))
    assert d.step().k == 1  # type: ignore[union-attr]
    d.scheduler.finish("b")
    assert d.step().k == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("decoding", "prefilling", "waiting", "k"),
    [(2, 0, 0, 8), (3, 0, 0, 1), (2, 1, 0, 1), (2, 0, 1, 1)],
)
def test_many_tokens_a_dispatch_only_if_all_can_get_their_pages(
    decoding: int, prefilling: int, waiting: int, k: int
) -> None:
    cache = KVCache(num_pages=6, page_size=4)  # five to hand out; eight tokens may take two each
    d = Driver(make_spec(max_k=8))
    d.submit(*(make_request(str(n)) for n in range(decoding)))
    d.step()
    running = d.scheduler._roster.running
    assert decode_tokens(d.spec, running, prefilling, waiting, cache) == k


def test_no_more_tokens_are_scheduled_than_max_tokens_allows() -> None:
    d = Driver(make_spec(max_k=4), depth=3)
    d.submit(request := make_request(max_tokens=6))
    ks = [plan.k if (plan := d.launch()) else None for _ in range(4)]
    assert ks == [1, 4, 4, None]  # 1 + 4 + 1: the third may bring one, then nothing is left
    while d.flights:
        d.collect()
    assert d.tokens["a"] == d.answer(request) and "a" in d.ends


# ---- how requests end


def test_a_stop_ends_the_request_and_tokens_after_it_are_dropped() -> None:
    plain = make_request(max_tokens=10)
    d = Driver(make_spec(max_k=5))
    answer = d.answer(plain)
    stop = next(t for t in answer[2:] if t not in answer[:2])
    at = answer.index(stop)

    class Overrun(frozenset):
        """The device knows of no stop ids, and runs on."""

    request = make_request(max_tokens=10, stop_token_ids=(stop,))
    d.submit(request)
    original = d.runner._init
    d.runner._init = lambda init: (  # type: ignore[method-assign]
        original(init),
        setattr(d.runner.slots[init.slot], "stops", Overrun()),
    )[0]
    d.run()
    assert d.tokens["a"] == answer[: at + 1]
    end = d.ends["a"]
    assert (end.finish_reason, end.stop_token) == (FinishReason.STOP, stop)


def test_stops_are_held_off_until_min_tokens() -> None:
    from array import array

    from quire.sched.results import accept

    def after(done: int, sampled: list[int], **sampling: int) -> tuple[list[int], object]:
        d = Driver(make_spec())
        d.submit(make_request(eos_ids=(9,), max_tokens=6, **sampling))
        seq = d.seq("a")
        seq.tokens.extend(array("i", [0] * done))
        reason = accept(seq, sampled)
        return sampled, reason

    assert after(0, [1, 9, 9, 2], min_tokens=2) == ([1, 9, 9], FinishReason.STOP)
    assert after(0, [9, 9, 1], min_tokens=2) == ([9, 9, 1], None)
    assert after(1, [9, 9, 1], min_tokens=2) == ([9, 9], FinishReason.STOP)
    assert after(4, [1, 2, 3]) == ([1, 2], FinishReason.LENGTH)
    assert after(4, [1, 9, 3]) == ([1, 9], FinishReason.STOP)
    assert after(4, [1, 2, 9]) == ([1, 2], FinishReason.LENGTH)
    assert after(0, [1, 9], ignore_eos=True) == ([1, 9], None)


def test_without_max_tokens_it_runs_to_the_end_of_the_context() -> None:
    d = Driver(make_spec(max_model_len=20))
    d.submit(make_request(max_tokens=None))
    d.run()
    assert len(d.tokens["a"]) == 17


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_finish_frees_everything_once_whenever_it_comes(depth: int, steps: int) -> None:
    d = Driver(make_spec(), depth=depth)
    d.submit(make_request(max_tokens=20))
    for _ in range(steps):
        d.step()
    for _ in range(2):
        d.scheduler.finish("a", FinishReason.STOP)
    d.scheduler.finish("nobody")
    d.run()
    assert d.ends["a"].finish_reason is FinishReason.STOP
    assert d.ends["a"].stop_token is None
    assert d.scheduler.stats().pages_used == 0
    with pytest.raises(InvalidRequest, match="reason"):
        d.scheduler.finish("a", FinishReason.ERROR)


def test_results_of_an_older_generation_are_dropped() -> None:
    """The slot of a request that was aborted in flight goes to another at once."""
    d = Driver(make_spec(slots=1), depth=1)
    d.submit(make_request("a", max_tokens=20))
    d.step()
    d.step()
    d.scheduler.finish("a")
    d.submit(request := make_request("b", prompt(7, 3)))
    plan = d.launch()
    assert plan is not None and plan.slots.tolist() == [0]
    assert plan.generations[0] == d.plans[0].generations[0] + 1
    d.run()
    assert d.tokens["b"] == d.answer(request)


def test_deadlines_end_those_who_wait_and_those_who_run() -> None:
    d = Driver(make_spec(slots=1), depth=1)
    d.submit(
        make_request("runs", max_tokens=30, deadline=5.0),
        make_request("waits", deadline=3.0),
        make_request("patient", max_tokens=2),
    )
    d.step()
    d.now = 2.999
    d.step()
    assert not d.ends
    d.now = 3.0
    d.step()
    assert list(d.ends) == ["waits"]
    d.now = 6.0
    d.run()
    for id in ("waits", "runs"):
        assert d.ends[id].finish_reason is FinishReason.ERROR
        assert isinstance(d.ends[id].error, DeadlineExceeded)
    assert d.ends["patient"].finish_reason is FinishReason.LENGTH


def test_a_full_queue_is_overloaded_and_says_when_to_come_back() -> None:
    d = Driver(make_spec(slots=1), max_queue=2)
    d.submit(make_request("a", max_tokens=2), make_request("b"))
    with pytest.raises(
        Overloaded, match=r"2 requests wait, at most 2 may now \(max_queue 2\)"
    ) as caught:
        d.submit(make_request("c"))
    assert caught.value.retry_after == 1.0
    d.now = 7.0
    d.step()  # a waited 7 s
    d.submit(make_request("c"))
    with pytest.raises(Overloaded) as caught:
        d.submit(make_request("d"))
    assert caught.value.retry_after == 7.0


def test_an_id_is_unique_among_unfinished_requests() -> None:
    d = Driver(make_spec())
    d.submit(make_request())
    with pytest.raises(InvalidRequest, match="id: got 'a'"):
        d.submit(make_request())
    d.run()
    for heard in (d.ended, d.choice_ends):
        heard.clear()
    d.submit(make_request())
    d.run()


def test_a_row_that_is_not_finite_fails_alone_and_leaves_no_kv_behind() -> None:
    d = Driver(make_spec(), depth=1)
    shared = prompt(0, 8)
    d.submit(good := make_request("good", (*shared, 1), max_tokens=9))
    d.step()
    d.submit(make_request("bad", (*shared, *prompt(20, 9)), max_tokens=9))
    d.launch()
    d.runner.poisoned_slots.add(d.seq("bad").slot)
    d.launch()
    d.run()
    assert d.tokens["good"] == d.answer(good)
    error = d.ends["bad"].error
    assert isinstance(error, Internal) and "'bad'" in str(error)
    cache = d.scheduler._cache
    chain = cache.chain(0, "", "")
    known = cache.match(chain, np.array([*shared, *prompt(20, 9)], np.int32)).tokens
    assert known == 8  # what the healthy neighbour registered, and no more


def test_bad_kv_is_forgotten_even_if_its_request_was_aborted_meanwhile() -> None:
    d = Driver(make_spec(), depth=1)
    d.submit(make_request("bad", prompt(0, 9)))
    d.launch()
    d.scheduler.finish("bad")
    d.hear(d.scheduler.take_outputs())
    assert d.scheduler.stats().pages_cached == 2
    plan, handle = d.flights.popleft()
    handle.not_finite[:] = True
    d.scheduler.update(plan, d.runner.collect(handle))
    assert d.scheduler.stats().pages_cached == 0
    d.scheduler.check_integrity()


# ---- prefixes


def test_equal_prompts_of_one_step_share_pages() -> None:
    d = Driver(make_spec())
    text = prompt(0, 10)
    d.submit(a := make_request("a", text), make_request("b", text))
    plan = d.step()
    assert plan is not None and plan.counts.tolist() == [10, 2]
    d.run()
    assert d.tokens["b"] == d.tokens["a"] == d.answer(a)
    assert (d.ends["a"].cached_tokens, d.ends["b"].cached_tokens) == (0, 8)
    stats = d.scheduler.stats()
    assert (stats.prefix_queried_tokens, stats.prefix_hit_tokens) == (20, 8)


def test_answers_are_found_as_prefixes_up_to_their_last_token() -> None:
    d = Driver(make_spec())
    d.submit(make_request("a", prompt(0, 5), max_tokens=4))
    d.run()
    text = (*prompt(0, 5), *d.tokens["a"])  # 9 tokens; the KV of the last was never computed
    d.submit(make_request("b", (*text[:8], 1)), make_request("c", (*text, 1, 2, 3, 4, 5)))
    d.run()
    assert (d.ends["b"].cached_tokens, d.ends["c"].cached_tokens) == (8, 8)


def test_the_kv_of_the_last_token_is_not_claimed() -> None:
    d = Driver(make_spec())
    d.submit(make_request("a", prompt(0, 5), max_tokens=3))
    d.run()
    text = (*prompt(0, 5), *d.tokens["a"], 1, 2)  # 8 known tokens, 7 of them computed
    d.submit(make_request("b", text))
    d.run()
    assert d.ends["b"].cached_tokens == 4


def test_a_page_that_is_not_full_is_not_found() -> None:
    """Its owner may be gone before the rest of it is computed."""
    d = Driver(make_spec(), prefill_chunk=6)
    d.submit(make_request("a", prompt(0, 12)))
    d.step()
    d.scheduler.finish("a")
    d.submit(request := make_request("b", prompt(0, 12)))
    d.run()
    assert d.ends["b"].cached_tokens == 4
    assert d.tokens["b"] == d.answer(request)


def test_salts_keep_requests_apart() -> None:
    d = Driver(make_spec())
    for id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        d.submit(make_request(id, prompt(0, 9), cache_salt=salt))
        d.run()
    assert [d.ends[id].cached_tokens for id in "abc"] == [0, 0, 8]


def test_tenants_share_no_prefixes():
    d = Driver(make_spec())
    for id, tenant in (("a", "x"), ("b", "y"), ("c", "x")):
        d.submit(make_request(id, prompt(0, 9), tenant=tenant))
        d.run()
    assert [d.ends[id].cached_tokens for id in "abc"] == [0, 0, 8]


# ---- pages run short


def tight(pages: int, **more: int) -> Driver:
    depth = more.pop("depth", 0)
    return Driver(make_spec(pages=pages, max_model_len=32, slots=4, **more), depth=depth)


def test_the_youngest_of_the_lowest_priority_gives_way() -> None:
    d = tight(10)  # nine pages of four
    requests = [
        make_request("old", prompt(0, 8), max_tokens=16, priority=1),
        make_request("vip", prompt(20, 8), max_tokens=16),
        make_request("young", prompt(40, 8), max_tokens=16, priority=1),
    ]
    d.submit(*requests)
    while not d.scheduler.stats().preemptions:
        d.step()
    assert d.seq("young").slot == -1
    assert d.seq("old").slot >= 0 and d.seq("vip").slot >= 0
    d.run()
    for request in requests:
        assert d.tokens[request.id] == d.answer(request)
    assert list(d.ends)[-1] == "young"


def test_who_has_results_on_the_way_is_collected_before_it_gives_way() -> None:
    d = tight(7, depth=1)  # six pages of four
    a, b = make_request("a", prompt(0, 7), max_tokens=16), make_request("b", prompt(20, 7), 16)
    d.submit(a, b)
    plans = []
    while not d.scheduler.stats().preemptions:
        in_flight, known = d.seq("b").in_flight, len(d.seq("b").tokens)
        plans.append(plan := d.launch())
        if len(d.flights) > (plan is not None):
            d.collect()
    rested = plans[-2]
    assert rested is None or 1 not in rested.slots
    assert in_flight == 0 and len(d.seq("b").tokens) == known
    d.run()
    assert d.tokens["a"] == d.answer(a) and d.tokens["b"] == d.answer(b)


def test_preemption_in_the_middle_of_a_prompt() -> None:
    d = Driver(make_spec(pages=9, max_model_len=32), prefill_chunk=4)
    a, b = make_request("a", prompt(0, 4), max_tokens=28), make_request("b", prompt(20, 8), 2)
    d.submit(a)
    for _ in range(10):
        d.step()  # a has 13 positions, four of the eight pages
    d.submit(b)
    d.step()
    assert 0 < d.seq("b").prefilled < 8
    d.preempt("b")
    d.scheduler.check_integrity()
    d.run()
    assert d.tokens["a"] == d.answer(a) and d.tokens["b"] == d.answer(b)


def test_found_again_is_not_recomputed() -> None:
    """What a preempted request finds in the index on its return costs nothing."""
    for caching, recomputed in ((True, 1), (False, 9)):
        d = Driver(make_spec(), prefix_caching=caching)
        d.submit(request := make_request(prompt=prompt(0, 8), max_tokens=6))
        d.step()
        d.step()  # 9 positions computed, 10 tokens known
        d.preempt("a")
        plan = d.step()
        assert plan is not None and plan.counts.tolist() == [2 if caching else 10]
        [init] = plan.inits
        assert (init.sample_index, init.remaining) == (2, 4)
        assert init.position == (8 if caching else 0)
        d.run()
        assert d.tokens["a"] == d.answer(request)
        stats = d.scheduler.stats()
        assert stats.recomputed_tokens == recomputed
        assert stats.useful_tokens == 13  # 8 + 6 tokens, of which the last is never fed back
        assert d.ends["a"].cached_tokens == 0  # of the first admission


def test_min_tokens_counts_on_after_a_preemption() -> None:
    d = Driver(make_spec())
    d.submit(make_request(max_tokens=8, min_tokens=3, eos_ids=(1,)))
    plan = d.step()
    assert plan is not None and plan.inits[0].min_remaining == 3
    d.step()
    d.preempt("a")
    plan = d.step()
    assert plan is not None and plan.inits[0].min_remaining == 1
    d.run()


def test_admission_keeps_a_page_for_each_who_runs() -> None:
    d = tight(6)  # five pages
    d.submit(make_request("a", prompt(0, 7), 10), make_request("b", prompt(20, 7), 10))
    d.step()
    assert [d.seq(id).slot >= 0 for id in "ab"] == [True, False]  # a: 2 + 1; b would need 3


def test_after_much_recomputing_admission_reserves_the_worst_case() -> None:
    d = tight(13)  # twelve pages
    d.scheduler._meters.recompute.count(0, 10**5)
    d.submit(*(make_request(id, prompt(20 * n, 7), max_tokens=18) for n, id in enumerate("abc")))
    d.step()
    assert [d.seq(id).slot >= 0 for id in "abc"] == [True, True, False]  # six pages each
    d.run()
    assert d.scheduler.stats().preemptions == 0


def test_pages_that_one_gives_back_count_for_those_who_grow_later() -> None:
    d = tight(11)  # ten pages
    d.scheduler._meters.recompute.count(0, 10**5)
    d.submit(make_request("a", prompt(0, 7), max_tokens=18))  # six pages in the end
    for _ in range(12):
        d.step()  # it has five, and six tokens to go
    d.submit(make_request("b", prompt(20, 7), max_tokens=18), make_request("c", prompt(40, 3), 5))
    d.step()
    # Six and six are more than ten, but b has four when a ends. Then there is none left for c.
    assert [d.seq(id).slot >= 0 for id in "abc"] == [True, True, False]
    d.run()
    assert d.scheduler.stats().preemptions == 0


def test_thrashing_is_bounded() -> None:
    """Many long answers in few pages: recomputation settles, because admission becomes careful."""
    d = Driver(make_spec(slots=8, pages=25, max_model_len=64, tokens=64), prefix_caching=False)
    for n in range(60):
        d.scheduler.add(make_request(str(n), prompt(n, 4), max_tokens=40, seed=n))
    d.run(limit=5000)
    stats = d.scheduler.stats()
    assert stats.preemptions > 0
    assert stats.recomputed_tokens < 0.2 * stats.useful_tokens


# ---- device failures


def test_who_ran_starts_over_once_and_then_ends() -> None:
    d = Driver(make_spec(slots=2), depth=1)
    a, b, c = (make_request(id, prompt(9 * n, 5), max_tokens=9) for n, id in enumerate("abc"))
    d.submit(a, b, c)
    for _ in range(3):
        d.step()
    d.scheduler.finish("b")
    d.flights.clear()
    d.runner.reset()
    d.scheduler.requeue_all(RuntimeError("device gone"))
    d.scheduler.check_integrity()
    assert d.scheduler.stats().pages_cached == 0
    for _ in range(3):
        d.step()
    assert d.seq("c").slot >= 0
    d.flights.clear()
    d.runner.reset()
    d.scheduler.requeue_all(RuntimeError("device gone"))
    d.hear(d.scheduler.take_outputs())
    error = d.ends["a"].error
    assert isinstance(error, Internal) and "device gone" in str(error.__cause__)
    assert str(error).startswith("request 'a': a step failed for the second time; the")
    assert d.tokens["a"] == d.answer(a)[: len(d.tokens["a"])]
    d.run()
    assert d.tokens["c"] == d.answer(c)


@pytest.mark.parametrize(
    ("depth", "steps", "again"),
    [
        (0, 4, 5 + 3),  # four tokens came, and the last one's KV was not yet computed
        (1, 4, 5 + 2),  # one fewer came
        (1, 1, 5),  # the prompt is on its way, and counted
    ],
)
def test_what_starts_over_is_counted_as_computed_again(depth: int, steps: int, again: int) -> None:
    d = Driver(make_spec(), depth=depth)
    d.submit(a := make_request("a", prompt(1, 5), max_tokens=9))
    for _ in range(steps):
        d.step()
    d.flights.clear()
    d.runner.reset()
    d.scheduler.requeue_all(RuntimeError("device gone"))
    d.run()
    assert d.tokens["a"] == d.answer(a)
    stats = d.scheduler.stats()
    # Useful: each position once, the last token's never.
    assert (stats.recomputed_tokens, stats.useful_tokens) == (again, 5 + 9 - 1)


def test_results_come_in_the_order_of_their_plans() -> None:
    d = Driver(make_spec(), depth=2)
    d.submit(make_request())
    d.launch()
    d.launch()
    plan, handle = d.flights.pop()
    with pytest.raises(RuntimeError, match="order"):
        d.scheduler.update(plan, handle)


def test_a_prompt_without_a_token_is_an_error_of_that_request() -> None:
    d = Driver(make_spec())
    d.submit(make_request())
    d.launch()
    d.flights[0][1].n_valid[:] = 0
    d.collect()
    assert isinstance(d.ends["a"].error, Internal)


# ---- numbers


def test_waste_of_a_lone_request_by_hand() -> None:
    d = Driver(make_spec(page_size=8, pages=9))
    d.submit(make_request(prompt=prompt(0, 6), max_tokens=4))
    for _ in range(4):
        d.step()
        d.now += 1
    # One second each with 6, 7, 8 positions of 8. The last step ended the request.
    assert "a" in d.ends
    assert d.scheduler.stats().waste == pytest.approx(1 - (6 + 7 + 8) / 24)


def test_padding_is_counted() -> None:
    d = Driver(make_spec(slots=4, tokens=32))
    d.submit(make_request(max_tokens=2))
    d.run()
    stats = d.scheduler.stats()
    assert (stats.real_tokens, stats.padded_tokens) == (3 + 1, 32 + 4)
    assert stats.padding_waste == pytest.approx(1 - 4 / 36)
