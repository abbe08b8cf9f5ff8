"""Products of few tokens, left in parts. Called by model/projection.py and model/decoder.py, and by
the kernels that sum parts while they read them.

To keep a whole device busy with a matrix of few rows, its columns are cut, too; each part is a
product [T, N] in float32. XLA does the same (and decides as here), but sums in a kernel apart.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .attention.gpu_pallas import load

_TILE, _TILES = 64, 512  # columns of a result that are computed together; how many fill a device
_LEAST = 128  # columns of a part


def num_parts(out_size: int, in_size: int) -> int:
    """Into how many parts the columns of a matrix [out_size, in_size] are cut: a power of two."""
    parts = 1
    while (
        2 * parts * out_size <= _TILE * _TILES
        and in_size % (2 * parts) == 0
        and in_size // (2 * parts) >= _LEAST
    ):
        parts *= 2
    return parts


def product_in_parts(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K] · weight [N, K]ᵀ -> float32 [parts, T, N], to be summed."""
    (tokens, size), out = x.shape, weight.shape[0]
    parts = num_parts(out, size)
    return jax.lax.dot_general(
        x.reshape(tokens, parts, size // parts),
        weight.reshape(out, parts, size // parts),
        (((2,), (2,)), ((1,), (1,))),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def whole(product: jax.Array, dtype: Any) -> jax.Array:
    """A product [T, N], or the sum of one in parts, in this type."""
    return (jnp.sum(product, axis=0) if product.ndim == 3 else product).astype(dtype)


def load_sum(ref: Any, at: tuple[Any, ...], mask: jax.Array) -> jax.Array:
    """Within a kernel: values of a product, in parts or not, in float32, 0 where the mask is
    false."""
    if len(ref.shape) == len(at):
        return load(ref, at, mask, jnp.float32)
    loaded = [load(ref, (i, *at), mask, jnp.float32) for i in range(ref.shape[0])]
    while len(loaded) > 1:
        loaded = [a + b for a, b in zip(loaded[::2], loaded[1::2], strict=True)]
    return loaded[0]
