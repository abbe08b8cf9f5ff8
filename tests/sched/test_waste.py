"""How much of the pages that running requests hold is empty, over a trace of chat lengths: the real
scheduler and pages, at an engine's size, against a device whose steps take a set time."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

import quire
from quire.config import EngineConfig
from quire.model.ladder import make_ladder
from quire.model.plan import Emit, RunnerSpec, StepOutputs, StepPlan
from quire.sched.request import Request, SamplingParams
from quire.sched.scheduler import Scheduler

TRACE = Path(quire.__file__).parent / "tools" / "bench" / "data" / "trace_sharegpt_like.json"
VOCAB, SLOTS, LONGEST = 1000, 256, 4096
STEP, TOKEN = 5e-3, 15e-6
"""Seconds: of a step, and of each token in it."""


def outputs(plan: StepPlan) -> StepOutputs:
    rows = plan.num_rows
    emits = (plan.emits == Emit.TOKEN).astype(np.int32)
    return StepOutputs(np.ones((rows, 1), np.int32), emits, np.zeros(rows, bool))


def waste(page_size: int) -> float:
    spec = RunnerSpec(
        num_slots=SLOTS,
        num_pages=1 + SLOTS * LONGEST // page_size,
        page_size=page_size,
        max_pages_per_seq=LONGEST // page_size,
        max_model_len=LONGEST,
        vocab_size=VOCAB,
        ladder=make_ladder(SLOTS, 2048),
    )
    now, draw = 0.0, random.Random(0)
    scheduler = Scheduler(spec, max_batched_tokens=2048, prefill_chunk=2048, clock=lambda: now)
    for i, (prompt, answer) in enumerate(json.loads(TRACE.read_text())):
        prompt = min(prompt, LONGEST - answer)
        ids = tuple(draw.choices(range(VOCAB), k=prompt))
        sampling = SamplingParams(temperature=0, seed=0, max_tokens=answer, ignore_eos=True)
        scheduler.submit(Request(id=str(i), prompt=ids, sampling=sampling))
    last: StepPlan | None = None
    while scheduler.unfinished:
        plan = scheduler.schedule()  # one step ahead of what is known, as the engine does
        if plan is not None:
            now += STEP + TOKEN * plan.num_tokens
        if last is not None:
            scheduler.update(last, outputs(last))
        scheduler.take_outputs()
        last = plan
    assert scheduler.stats().pages_used == 0
    return scheduler.stats().waste


def test_less_than_4_percent_of_held_pages_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    default = EngineConfig().page_size
    found = {size: waste(size) for size in (16, 32, 64)}
    with capsys.disabled():
        print("\npage waste:", ", ".join(f"{share:.2%} at {n}" for n, share in found.items()))
    assert found[default] < 0.04
    assert 0 < found[16] < found[32] < found[64]
