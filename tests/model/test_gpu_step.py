"""Whole engine steps with a GPU's own kernels around the products, interpreted on CPU."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from stepping import ints

from quire.model import projection
from quire.model.abstract import AbstractDecoder
from quire.model.config import ModelConfig, RopeConfig
from quire.model.kernels.gemv_gpu import GemvShape
from quire.model.ladder import Bucket, Ladder, Sampler
from quire.model.mesh import default_mesh
from quire.model.plan import Emit, RunnerSpec, SlotInit, StepPlan
from quire.model.programs import Programs
from quire.model.runner import ModelRunner

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    norm_eps=1e-6,
    rope=RopeConfig(),
    windows=(None, 6),
    max_positions=64,
    qkv_bias=True,
    qk_norm=True,
)
MIXED, ONE = Bucket(24, 4, Sampler.GREEDY), Bucket(1, 1, Sampler.GREEDY)
LADDER = Ladder([replace(MIXED, sampler=Sampler.FULL), MIXED, ONE])
SPEC = RunnerSpec(4, 16, 4, 8, 32, CONFIG.vocab_size, LADDER)


@pytest.mark.parametrize("alone", [(), ("out", "down"), ("qkv", "out", "gate_up", "down")])
def test_the_same_tokens_and_the_same_cache(
    alone: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever products of one token are kernels of their own."""
    measured = {"qkv": (96, 16), "out": (16, 48), "gate_up": (48, 16), "down": (16, 24)}
    shapes = tuple((measured[name], GemvShape(block=32)) for name in alone)
    norms = projection.Products(norms=True, interpret=True)
    ways = ((1, replace(norms, alone=shapes)), (MIXED.tokens, norms))
    monkeypatch.setitem(projection._BY_TOKENS, "this", ways)
    decoder, mesh = AbstractDecoder(CONFIG, "float32"), default_mesh()
    params = {name: 6 * value for name, value in decoder.initial_params(0).items()}
    params = jax.device_put(params, mesh.everywhere)
    plain, own = (ModelRunner(decoder, params, SPEC, mesh) for _ in range(2))
    own._programs = Programs(decoder, SPEC, mesh, writer="gpu_interpret", projection="this")

    prompts = (np.arange(9) * 5 % 61, np.arange(6) * 7 % 61)
    pages = [(slot, index, 1 + 4 * slot + index) for slot in (0, 1) for index in range(4)]
    first = StepPlan(
        ints(0, 1), ints(1, 1), ints(0, 0), ints(9, 6), ints(Emit.TOKEN, Emit.TOKEN), 0, MIXED,
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        page_adds=np.array(pages, np.int32),
        inits=tuple(SlotInit(slot=slot, position=0, remaining=5) for slot in (0, 1)),
    )  # fmt: skip
    both = StepPlan(
        ints(0, 1), ints(1, 1), ints(9, 6), ints(1, 1), ints(Emit.TOKEN, Emit.TOKEN), 2, MIXED
    )
    one = StepPlan(ints(1), ints(1), ints(7), ints(1), ints(Emit.TOKEN), 1, ONE)
    for plan in (first, both, one, one):
        got, want = (runner.collect(runner.launch(plan)) for runner in (own, plain))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.n_valid, want.n_valid)

    slab, expected = (np.asarray(runner._slabs["kv"]) for runner in (own, plain))
    np.testing.assert_allclose(slab, expected, atol=1e-4)
    # Padding of the step wrote nothing.
    np.testing.assert_array_equal(np.any(slab != 0, (2, 3)), np.any(expected != 0, (2, 3)))
