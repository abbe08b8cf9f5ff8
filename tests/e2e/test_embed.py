"""Embeddings of a checkpoint that transformers saved are transformers' own, however batched."""

from __future__ import annotations

import numpy as np
import pytest
import zoo
from harness import Bench

from quire import SamplingParams
from quire.sched.request import POOLED_SAMPLING

# One process for all, so that each program compiles once; with the other tests of this checkpoint.
pytestmark = pytest.mark.xdist_group("equalities")

CASE = zoo.BY_NAME["qwen25-tied-some-windows"]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def bench():
    return Bench(zoo.get(CASE)[0])


def embeddings(session, prompts, **more):
    for i, prompt in enumerate(prompts):
        session.submit(f"e{i}", prompt, POOLED_SAMPLING, pooled=True, **more)
    session.run()
    return [session.outputs[f"e{i}"][-1].pooled for i in range(len(prompts))]


@pytest.fixture(scope="module")
def alone(bench):
    """Each prompt in a batch of its own, in one chunk, nothing cached."""
    return [embeddings(bench.engine(prefix_caching=False), [p])[0] for p in zoo.prompts()]


def check(got, expected):
    np.testing.assert_allclose(got, expected, atol=2e-6)


def test_they_are_transformers(bench, alone):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(zoo.get(CASE)[0], dtype=torch.float32).eval()
    for prompt, ours in zip(zoo.prompts(), alone, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt])).last_hidden_state[0, -1]
        theirs = torch.nn.functional.normalize(hidden, dim=0).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert abs(np.array(alone) @ np.array(alone).T - np.eye(len(alone))).max() < 0.9  # all differ


@pytest.mark.parametrize("chunk", [16, 1024], ids=["chunk16", "whole"])
def test_beside_answers_each_is_what_it_is_alone(bench, alone, chunk):
    prompts = zoo.prompts()
    answers = bench.engine(prefix_caching=False).answers(prompts, GREEDY)
    session = bench.engine(chunk=chunk)  # finds answers' prompts cached, and the other way round
    for i, prompt in enumerate(prompts[::-1]):
        session.submit(str(len(prompts) - 1 - i), prompt, GREEDY)
    check(embeddings(session, prompts), alone)
    assert [session.tokens(str(i)) for i in range(len(prompts))] == answers
    assert session.scheduler.stats().prefix_hit_tokens > 300


def test_preempted_it_is_the_same(bench, alone):
    """Answers that grow while a long prompt comes in small chunks take its pages."""
    prompts = zoo.prompts()
    session = bench.engine(chunk=4, num_pages=42)
    for i in (3, 4, 5):
        session.submit(f"long {i}", prompts[i], SamplingParams(temperature=0, max_tokens=120))
    check(embeddings(session, prompts[7:], priority=1), alone[7:])
    assert session.scheduler.stats().preemptions > 0
