"""Letting the next kernel of a CUDA graph start while this one runs. Called by the GPU kernels
beside this module where switches.py says so.

From JAX 0.11 on XLA launches kernels that follow each other with "programmatic dependent launch"
(Hopper and newer): each waits in its first instruction until those before it are done. That wait is
XLA's; what a kernel of ours can do is to say early that the next may take its place on the device.
What follows must load by ordinary loads, as kernels from Pallas do: XLA's own fusions may load what
they take for constant before they wait.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton

from . import switches


def let_next_start(index: jax.Array, *, interpret: bool) -> jax.Array:
    """Within a kernel: the index (int32, a scalar) as it is, once the next kernel may start. To be
    used, or the compiler takes it away."""
    if interpret or not switches.EARLY_LAUNCH:
        return index
    one = jnp.full((1,), index, index.dtype)  # assembly takes no scalars
    [same] = triton.elementwise_inline_asm(
        "{ griddepcontrol.launch_dependents; mov.b32 $0, $1; }",
        args=[one],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(one.shape, one.dtype)],
    )
    return jnp.sum(same)
