"""A whole engine step with the TPU's kernels and padded slabs, interpreted on CPU."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np

from quire.model.abstract import AbstractDecoder
from quire.model.cache import cache_groups
from quire.model.config import ModelConfig, RopeConfig
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
)
MIXED = Bucket(24, 4, Sampler.GREEDY)
SPEC = RunnerSpec(
    4, 16, 4, 8, 32, CONFIG.vocab_size, Ladder([replace(MIXED, sampler=Sampler.FULL), MIXED])
)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_the_same_tokens_and_the_same_cache() -> None:
    decoder, mesh = AbstractDecoder(CONFIG, "float32"), default_mesh()
    params = {name: 6 * value for name, value in decoder.initial_params(0).items()}
    params = jax.device_put(params, mesh.everywhere)
    plain, tpu = (ModelRunner(decoder, params, SPEC, mesh) for _ in range(2))
    tpu._programs = Programs(decoder, SPEC, mesh, attention="tpu_interpret", writer="tpu_interpret")
    tpu._programs.groups = cache_groups(CONFIG, "float32", platform="tpu")
    tpu._compiled.clear()  # its state is of another shape
    tpu._calls.clear()
    tpu.reset()

    prompts = (np.arange(9) * 5 % 61, np.arange(6) * 7 % 61)
    pages = [(slot, index, 1 + 4 * slot + index) for slot in (0, 1) for index in range(4)]
    first = StepPlan(
        ints(0, 1), ints(1, 1), ints(0, 0), ints(9, 6), ints(Emit.TOKEN, Emit.TOKEN), 0, MIXED,
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        page_adds=np.array(pages, np.int32),
        inits=tuple(SlotInit(slot=slot, position=0, remaining=5) for slot in (0, 1)),
    )  # fmt: skip
    more = StepPlan(
        ints(0, 1), ints(1, 1), ints(9, 6), ints(1, 1), ints(Emit.TOKEN, Emit.TOKEN), 2, MIXED
    )
    for plan in (first, more, more):
        got, want = (runner.collect(runner.launch(plan)) for runner in (tpu, plain))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(got.n_valid, [1, 1])

    slab, padded = plain._slabs["kv"], tpu._slabs["kv"]
    assert padded.shape[2:] == (8, 128)
    np.testing.assert_allclose(padded[:, :, :6, :8], slab, atol=1e-4)
    assert np.count_nonzero(padded) == np.count_nonzero(slab)  # padding stays zero
