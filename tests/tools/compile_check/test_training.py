"""The training step of the demo models, a layer of each, compiled for an H200 that is not there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from quire.tools.compile_check import compile_for, gpu_mesh
from quire.tools.train_demo.attention import EVERYWHERE, MIXES
from quire.tools.train_demo.model import shipped_configs
from quire.tools.train_demo.train import SHIPPED, Trainer

pytestmark = [pytest.mark.xdist_group("compile for gpu"), pytest.mark.slow]
VOCABULARY = 2048


def test_a_step_never_writes_scores_and_changes_its_state_in_place(
    needs_compiler: Callable[[str], None],
) -> None:
    needs_compiler("gpu")
    fused = next(mix for name, mix in MIXES.items() if name != EVERYWHERE)
    configs = {
        name: replace(config, num_layers=1, windows=(None,))
        for name, config in shipped_configs(VOCABULARY).items()
    }
    trainer = Trainer(configs, SHIPPED, fused, "bfloat16")
    mesh = gpu_mesh()

    def there(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.of((None,) * len(shape)))

    state = jax.tree.map(
        lambda x: there(x.shape, x.dtype), jax.eval_shape(lambda: trainer.initial(0))
    )
    layout = SHIPPED.plan.layout
    with jax.sharding.use_abstract_mesh(mesh.abstract):
        traced = trainer.step.trace(  # type: ignore[attr-defined]
            state, there((layout.tokens,), jnp.dtype("uint16")), there((), jnp.dtype("float32"))
        )
    report = compile_for(traced.lower(lowering_platforms=mesh.lowering_platforms), "gpu")
    assert report.kernels("mha_forward") == report.kernels("mha_backward") == 2 * len(layout.parts)
    assert not re.search(rf"\[(\d+,)*{layout.longest},{layout.longest}\]", report.hlo)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert report.alias_bytes > 0.99 * size
    # Logits and their gradients, of which there are two models'; a layer's activations are less.
    assert report.temp_bytes < 8 * layout.tokens * VOCABULARY * 4
