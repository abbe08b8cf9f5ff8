"""At the limit of pages, in virtual time: requests that do not fit wait, and what runs does not
take each other's pages over and over.

Steps take what an H200 needs for them with an 8B model: 3.6 ms to read the weights or 26 us a
token, whichever is more, 0.6 ms besides, and the KV of all rows at 4 TB/s. `pytest -s` prints the
figures.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
from fake_runner import make_request

from quire.model.plan import StepPlan
from quire.sched.scheduler import Scheduler
from quire.tools.bench.null_runner import NullRunner, null_spec
from quire.tools.bench.trace import read_trace

KV_BYTES = 131_072  # a token


def seconds_of(plan: StepPlan) -> float:
    cached = int((plan.starts + plan.counts).sum())
    return 0.0006 + max(0.0036, plan.bucket.tokens * 2.6e-5) + cached * KV_BYTES / 4e12


@dataclass
class Seen:
    """Of a run after its first quarter.

    Attributes:
      rate: output tokens a second.
      thrash: tokens computed again for each output token.
      use: pages held, of all there are, over time.
    """

    rate: float
    thrash: float
    preemptions: int
    most: int
    use: float


def play(trace_name: str, slots: int, pages: int, seconds: float) -> Seen:
    """As many requests under way as there are slots: each that ends is followed by the next."""
    trace, draw, now = read_trace(trace_name), np.random.default_rng(0), 0.0
    spec = null_spec(slots, page_size=32, max_model_len=4096, pages=pages + 1)
    scheduler = Scheduler(
        spec,
        max_batched_tokens=2048,
        prefill_chunk=2048,
        max_queue=2 * slots,
        clock=lambda: now,
    )
    runner, flights, made = NullRunner(spec), deque[tuple[StepPlan, float]](), 0

    def submit() -> None:
        nonlocal made
        at = made % len(trace)
        made += 1
        prompt = tuple(draw.integers(0, spec.vocab_size, trace.prompts[at]).tolist())
        scheduler.submit(make_request(str(made), prompt, trace.outputs[at], ignore_eos=True))

    for _ in range(slots):
        submit()
    begun, tokens, held, most = None, 0, 0.0, 0
    while now < seconds:
        plan = scheduler.schedule()
        if plan is not None:
            flights.append((plan, seconds_of(plan)))
        used = scheduler.stats().pages_used
        most = max(most, used)
        assert flights, "nothing runs, and nothing ever will"
        if len(flights) > (plan is not None):
            done, took = flights.popleft()
            now += took
            for output in scheduler.update(done, runner.collect(done)):
                tokens += len(output.tokens) if begun else 0
                if output.ended:
                    submit()
            held += took * used if begun else 0.0
            if begun is None and now >= seconds / 4:
                begun = now, scheduler.stats()
    scheduler.check_integrity()
    assert begun is not None
    since, before = begun
    after = scheduler.stats()
    return Seen(
        rate=tokens / (now - since),
        thrash=(after.recomputed_tokens - before.recomputed_tokens) / tokens,
        preemptions=after.preemptions - before.preemptions,
        most=most,
        use=held / (now - since) / pages,
    )


def test_half_of_the_pages_cost_less_than_a_tenth() -> None:
    """The trace of the benchmarks: what waits for pages costs nothing, and nobody gives way."""
    free = play("sharegpt-like", 384, 40_000, 12)
    tight = play("sharegpt-like", 384, free.most // 2, 12)
    print(f"\n{free}\n{tight}: {tight.rate / free.rate:.1%}")
    assert tight.rate > 0.9 * free.rate and tight.thrash < 0.02
    assert tight.use > 0.85  # and admission is not timid


@pytest.mark.parametrize("pages", [1600, 800])
def test_answers_that_all_grow_do_not_thrash(pages: int) -> None:
    """Each takes 33 pages in the end and 2 at first: all that come in together run short together.
    How much is computed again is bounded all the same."""
    seen = play("long-answers", 128, pages, 60)
    print(f"\n{pages} pages: {seen}")
    assert seen.preemptions > 0, "the pages were never short"
    assert seen.thrash < 0.15 and seen.use > 0.55
