"""A tiny model on a runner, and plans made by hand: what tests of step programs share."""

from __future__ import annotations

import jax
import numpy as np

from quire.model.abstract import AbstractDecoder
from quire.model.config import ModelConfig, RopeConfig
from quire.model.ladder import Bucket
from quire.model.mesh import default_mesh
from quire.model.plan import Emit, RunnerSpec, StepOutputs, StepPlan
from quire.model.runner import ModelRunner

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    norm_eps=1e-6,
    rope=RopeConfig(),
    windows=(None, None),
    max_positions=4096,
)


def make_runner(spec: RunnerSpec, shards: int = 1) -> ModelRunner:
    """With weights large enough for lively answers."""
    mesh, decoder = default_mesh(shards), AbstractDecoder(CONFIG, "float32", shards)
    whole = AbstractDecoder(CONFIG, "float32").initial_params(0)
    params = {
        name: jax.device_put(decoder.arrange(name, 6 * np.asarray(array)), mesh.of(weight.axes))
        for (name, array), weight in zip(whole.items(), decoder.specs.values(), strict=True)
    }
    return ModelRunner(decoder, params, spec, mesh)


def ints(*values):
    return np.array(values, np.int32)


def prompt_plan(tokens, bucket: Bucket, *, slot=0, start=0, emit=Emit.TOKEN, **more) -> StepPlan:
    return StepPlan(
        ints(slot), ints(1), ints(start), ints(len(tokens)), ints(emit), 0, bucket,
        prompt_tokens=ints(*tokens), **more,
    )  # fmt: skip


def decode_plan(*slots, bucket: Bucket, **more) -> StepPlan:
    ones = ints(*[1] * len(slots))
    return StepPlan(ints(*slots), ones, ones, ones, ones, len(slots), bucket, k=bucket.k, **more)


def pages(slot, first_page, count):
    """Page-table entries of a slot."""
    return ints(*[(slot, i, first_page + i) for i in range(count)]).reshape(-1, 3)


def run(runner: ModelRunner, plan: StepPlan) -> StepOutputs:
    return runner.collect(runner.launch(plan))


def state(runner: ModelRunner):
    return jax.tree.map(np.asarray, (runner._slabs, runner._slots))
