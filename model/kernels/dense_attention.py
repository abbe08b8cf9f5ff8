"""Attention over dense rows that hold several sequences each, with a backward pass: for training.

Called by tools/train_demo/attention.py. The kernel is JAX's own, which does not promise to keep it;
serving's attention (attention/) reads pages and has no backward pass.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    forward: int,
    backward: int,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within each segment of each row; scores stay on the chip.

    Args:
      q: [R, L, H, D]; k, v: [R, L, KH, D], KH a divisor of H.
      segments: int32 [R, L], which sequence of its row a token belongs to.
      forward, backward: queries and keys of a block, in either pass; divide L.
      interpret: run it where there is no GPU, slowly.

    Returns:
      [R, L, H, D].
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    blocks = BlockSizes(forward, forward, backward, backward, backward, backward)
    return mha(q, k, v, segments, q.shape[-1] ** -0.5, True, blocks, interpret=interpret)
