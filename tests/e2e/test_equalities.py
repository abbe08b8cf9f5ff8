"""The same tokens however a request is served: alone or together, in whole or chunked, from the
prefix cache or not, preempted or not, whatever the ladder. Greedy answers are transformers', too.
"""

from __future__ import annotations

import pytest
import zoo
from harness import Bench, ladder

from quire import SamplingParams
from quire.sched.scheduler import Scheduler

# One process for all, so that each program compiles once.
pytestmark = pytest.mark.xdist_group("equalities")

GREEDY = SamplingParams(temperature=0, max_tokens=zoo.NEW_TOKENS)
CASE = zoo.BY_NAME["qwen25-tied-some-windows"]  # layers with and without a window


def _sampled(index: int) -> SamplingParams:
    """A different kind of sampling for each request."""
    return SamplingParams(
        temperature=0.7 + 0.1 * index,
        top_k=(0, 40, 5)[index % 3],
        top_p=(1.0, 0.9)[index % 2],
        min_p=(0.0, 0.02)[index // 2 % 2],
        seed=index,
        max_tokens=zoo.NEW_TOKENS,
    )


MIXED = [GREEDY if i in (2, 5) else _sampled(i) for i in range(len(zoo.PROMPT_LENGTHS))]


@pytest.fixture(scope="module")
def bench():
    folder, references = zoo.get(CASE)
    bench = Bench(folder)
    bench.references = references
    # What sampled requests must give everywhere: each alone, in one chunk, nothing cached.
    bench.sampled = [
        bench.engine(prefix_caching=False, overlap=False).answers([prompt], params)[0]
        for prompt, params in zip(zoo.prompts(), MIXED, strict=True)
    ]
    return bench


def check(bench: Bench, **options) -> None:
    """Greedy and sampled answers under these options equal the references."""
    prompts = zoo.prompts()
    assert bench.engine(**options).answers(prompts, GREEDY) == [r.tokens for r in bench.references]
    assert bench.engine(**options).answers(prompts, MIXED) == bench.sampled


def test_sampled_references_bite(bench):
    """Sampling really chose, and the greedy rows among them are transformers' answers."""
    for i, (params, tokens) in enumerate(zip(MIXED, bench.sampled, strict=True)):
        greedy = bench.references[i].tokens
        assert (tokens == greedy) == (params.temperature == 0), i
        assert len(set(tokens)) >= zoo.MIN_DISTINCT


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no-overlap"])
@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("chunk", [16, 64, 1024], ids=["chunk16", "chunk64", "whole"])
def test_together(bench, chunk, prefix_caching, overlap):
    check(bench, chunk=chunk, budget=1024, prefix_caching=prefix_caching, overlap=overlap)


@pytest.mark.parametrize("chunk", [16, 64, 1024], ids=["chunk16", "chunk64", "whole"])
def test_alone(bench, chunk):
    for reference in bench.references:
        session = bench.engine(chunk=chunk)
        assert session.answers([reference.prompt], GREEDY) == [reference.tokens]


def test_small_budget_mixes_chunks_with_decode_rows(bench):
    check(bench, budget=24)


def test_prefix_hits_change_nothing(bench):
    """The same prompts again, then prompts that share beginnings, from the cache this time."""
    session = bench.engine()
    prompts = zoo.prompts()
    expected = [r.tokens for r in bench.references]
    assert session.answers(prompts, GREEDY) == expected
    before = session.scheduler.stats().prefix_hit_tokens
    for i, prompt in enumerate(prompts):
        session.submit(f"again {i}", prompt, GREEDY)
    # A conversation's second turn: the first prompt, its answer, and more.
    longer = prompts[6] + expected[6] + prompts[3]
    session.submit("turn", longer, GREEDY)
    session.run()
    assert [session.tokens(f"again {i}") for i in range(len(prompts))] == expected
    assert session.scheduler.stats().prefix_hit_tokens - before > 600
    assert session.outputs["turn"][-1].cached_tokens >= 240  # answers are found, too
    alone = bench.engine(prefix_caching=False).answers([longer], GREEDY)
    assert [session.tokens("turn")] == alone


class Witness(Scheduler):
    """Records how requests were preempted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mid_prefill = self.decoding = self.rested = 0
        pressure = self._planner.pressure
        preempt, grow = pressure.preempt, pressure.grow

        def seen_preempt(seq):
            assert seq.in_flight == 0  # its results were read
            if seq.prefilled < seq.target:
                self.mid_prefill += 1
            else:
                self.decoding += 1
            preempt(seq)

        def seen_grow(seq, positions, **how):
            grown = grow(seq, positions, **how)
            self.rested += pressure.resting is not None
            return grown

        pressure.preempt, pressure.grow = seen_preempt, seen_grow


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["prefix", "no-prefix"])
def test_preemption_with_a_result_in_flight(bench, prefix_caching):
    """A pool in which the answers cannot all grow: some wait for an unread result, then yield."""
    session = bench.engine(num_pages=36, prefix_caching=prefix_caching, scheduler=Witness)
    prompts = zoo.prompts()[:7]
    assert session.answers(prompts, MIXED[:7]) == bench.sampled[:7]
    assert session.scheduler.decoding > 0
    assert session.scheduler.rested > 0


def test_preemption_in_the_middle_of_a_prompt(bench):
    """A long prompt in small chunks; answers of higher priority grow into its pages meanwhile."""
    session = bench.engine(num_pages=27, chunk=4, budget=12, scheduler=Witness)
    prompts = zoo.prompts()
    session.submit("6", prompts[6], MIXED[6], priority=1)
    session.engine.step()
    for i in (2, 3, 4):
        session.submit(str(i), prompts[i], MIXED[i], priority=0)
    session.run()
    for i in (2, 3, 4, 6):
        assert session.tokens(str(i)) == bench.sampled[i]
    assert session.scheduler.mid_prefill > 0


@pytest.mark.parametrize(
    "shapes",
    [[(3, 3), (40, 3)], [(1, 1), (4, 4), (8, 8), (16, 4), (96, 8)]],
    ids=["coarse", "fine"],
)
def test_other_ladders(bench, shapes):
    session = bench.engine(ladder=ladder(*shapes))
    assert session.answers(zoo.prompts(), MIXED) == bench.sampled


def test_other_page_size(bench):
    other = Bench(bench.checkpoint.folder, page_size=64, num_pages=100)
    prompts = zoo.prompts()
    assert other.engine(chunk=48).answers(prompts, MIXED) == bench.sampled
