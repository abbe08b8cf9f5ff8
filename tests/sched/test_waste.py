"""How much of the pages that running requests hold is empty, and how much of what steps compute is
padding, over a trace of chat lengths: the real scheduler, pages and ladder, at an engine's size,
against a device whose steps take a set time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.model.ladder import make_ladder
from quire.model.memory import PLATFORMS
from quire.model.plan import Emit, RunnerSpec, Sampler, StepOutputs, StepPlan
from quire.sched.policy import step_tokens
from quire.sched.request import Request, SamplingParams
from quire.sched.scheduler import Scheduler
from quire.tools.bench.null_runner import null_spec

TRACE = Path(quire.__file__).parent / "tools" / "bench" / "data" / "trace_sharegpt_like.json"
VOCAB, LONGEST = 1000, 4096
STEP, TOKEN = 5e-3, 15e-6
"""Seconds: of a step, and of each token in it."""


def outputs(plan: StepPlan) -> StepOutputs:
    rows = plan.num_rows
    emits = (plan.emits == Emit.TOKEN).astype(np.int32)
    return StepOutputs(np.ones((rows, 1), np.int32), emits, np.zeros(rows, bool))


def serve(page_size: int, slots: int = 256) -> tuple[float, float]:
    """(share of held positions, share of computed tokens) that nobody uses."""
    spec = RunnerSpec(
        num_slots=slots,
        num_pages=1 + slots * LONGEST // page_size,
        page_size=page_size,
        max_pages_per_seq=LONGEST // page_size,
        max_model_len=LONGEST,
        vocab_size=VOCAB,
        ladder=make_ladder(slots, 2048),
    )
    now, draw = 0.0, random.Random(0)
    scheduler = Scheduler(spec, max_batched_tokens=2048, prefill_chunk=2048, clock=lambda: now)
    for i, (prompt, answer) in enumerate(json.loads(TRACE.read_text())):
        prompt = min(prompt, LONGEST - answer)
        ids = tuple(draw.choices(range(VOCAB), k=prompt))
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=answer, ignore_eos=True)
        scheduler.submit(Request(id=str(i), prompt=ids, sampling=sampling))
    last: StepPlan | None = None
    used = computed = 0
    while scheduler.unfinished:
        plan = scheduler.schedule()  # one step ahead of what is known, as the engine does
        if plan is not None:
            now += STEP + TOKEN * plan.num_tokens
            used, computed = used + plan.num_tokens, computed + plan.bucket.tokens
        if last is not None:
            scheduler.update(last, outputs(last))
        scheduler.take_outputs()
        last = plan
    assert scheduler.stats().pages_used == 0
    return scheduler.stats().waste, 1 - used / computed


@pytest.mark.parametrize("slots", [256, 1024])  # the second is an H200's default
def test_less_than_4_percent_of_held_pages_is_empty(
    slots: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {size: serve(size, slots)[0] for size in (16, 32, 64)}
    shares = ", ".join(f"{share:.2%} at {n}" for n, share in found.items())
    with capsys.disabled():
        print(f"\npage waste with {slots} at once: {shares}")
    assert found[PLATFORMS["gpu"].page_size] < 0.04
    assert 0 < found[16] < found[32] < found[64]


def test_little_of_what_steps_compute_is_padding(capsys: pytest.CaptureFixture[str]) -> None:
    page = PLATFORMS["gpu"].page_size
    found = {slots: serve(page, slots)[1] for slots in (256, 1024)}
    with capsys.disabled():
        print("\npadding:", ", ".join(f"{share:.2%} with {n}" for n, share in found.items()))
    assert found[256] < 0.12 and found[1024] < 0.1


def test_prompts_hold_up_answers_for_one_rung_at_most() -> None:
    ladder = make_ladder(1024, 2048)
    greedy = Sampler.GREEDY
    sizes = {n: step_tokens(ladder, 2048, n, greedy) for n in (0, 1, 192, 193, 257, 500, 1000)}
    assert sizes == {0: 2048, 1: 768, 192: 768, 193: 1024, 257: 1536, 500: 2048, 1000: 2048}
    assert step_tokens(ladder, 512, 8, greedy) == 512


@pytest.mark.parametrize("sampler", [Sampler.GREEDY, Sampler.SAMPLE])
def test_steps_that_hold_answers_up_are_full_of_prompts_whatever_the_sampler(
    sampler: Sampler,
) -> None:
    spec = null_spec(256, page_size=32, max_model_len=4096, pages=1000)
    scheduler = Scheduler(spec, max_batched_tokens=2048, prefill_chunk=2048, clock=lambda: 0.0)
    sampling = SamplingParams(temperature=float(sampler), seed=0, max_tokens=9, ignore_eos=True)
    assert sampling.sampler == sampler
    scheduler.submit(Request(id="a", prompt=(1, 2), sampling=sampling))
    first = scheduler.schedule()
    assert first is not None
    scheduler.update(first, outputs(first))
    scheduler.submit(Request(id="b", prompt=(3,) * 4000, sampling=sampling))
    busy = scheduler.schedule()
    assert busy is not None and busy.num_decode == 1
    assert busy.num_tokens == busy.bucket.tokens < 2048
