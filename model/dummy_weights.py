"""Random weights made on the devices, for measuring without a checkpoint (`--dummy-weights`).

Called by serving/assemble.py in place of loading. Nothing passes through the host: each parameter
is the output of a program that is sharded as the parameter is. The same seed gives the same numbers
on any mesh.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from .abstract import AbstractDecoder
from .compile import Progress
from .mesh import Mesh
from .weights import Params, WeightSpec

_STDDEV = 0.02
"""Of matrices and biases; with norm scales of 1, logits stay finite at any depth."""


def dummy_params(
    decoder: AbstractDecoder, mesh: Mesh, *, seed: int = 0, progress: Progress | None = None
) -> Params:
    """Every parameter of `decoder.specs`, placed on the mesh: norm scales 1, the rest N(0, 0.02²).

    Args:
      decoder: says which parameters there are.
      mesh: where they go.
      seed: of all of them.
      progress: called with (done, total) parameters.
    """

    @cache  # layers are alike: a handful of programs makes them all
    def maker(spec: WeightSpec, is_scale: bool) -> Any:
        def make(index: int) -> jax.Array:
            if is_scale:
                return jnp.ones(spec.shape, spec.dtype)
            key = jax.random.fold_in(jax.random.key(seed), index)
            return _STDDEV * jax.random.normal(key, spec.shape, jnp.dtype(spec.dtype))

        return jax.jit(make, out_shardings=mesh.of(spec.axes))

    specs = decoder.specs
    params: Params = {}
    for index, (name, spec) in enumerate(specs.items()):
        params[name] = maker(spec, name.endswith(".scale"))(index)
        if progress is not None:
            progress(index + 1, len(specs))
    jax.block_until_ready(params)
    return params
