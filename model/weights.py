"""Weights: how one is declared and multiplied by.

A weight is declared once, in the module that uses it (model/decoder.py): shape, logical axes,
initializer. From that come the specs that loaders fill and the binding of a flat dict of arrays
(model/abstract.py), its placement (model/mesh.py) and, for training, its initial value.

`contract` and `take_rows` are the only places that look inside a matrix, so that quantized weights
can take a plain array's place without the layers noticing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

WeightArray = jax.Array
"""What a parameter is: an array; a quantized one will be a pytree of values and scales that
`contract` and `take_rows` know. Step programs and the runner treat parameters as pytrees."""

Params = dict[str, WeightArray]
"""Parameter name ("layers.0.attn.qkv.weight") to weight; matrices are [out, in], as on disk."""

Axes = tuple[str | None, ...]

_INIT_STDDEV = 0.02


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One parameter: shape, dtype name, and a logical axis name (or None) per dimension."""

    shape: tuple[int, ...]
    dtype: str
    axes: Axes

    @property
    def nbytes(self) -> int:
        size = jnp.dtype(self.dtype).itemsize
        for dim in self.shape:
            size *= dim
        return size


def matrix(rngs: nnx.Rngs, shape: tuple[int, int], axes: Axes, dtype: Any) -> nnx.Param:
    """Declares a matrix [out, in], drawn from N(0, 0.02²)."""
    value = _INIT_STDDEV * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


def zeros(shape: tuple[int, ...], axes: Axes, dtype: Any) -> nnx.Param:
    """Declares a bias."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def ones(shape: tuple[int, ...], axes: Axes, dtype: Any) -> nnx.Param:
    """Declares a norm's scale."""
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


def contract(x: jax.Array, weight: nnx.Param, *, out_dtype: Any = None) -> jax.Array:
    """x [..., in] times weight [out, in] -> [..., out].

    Accumulates in float32. float32 operands multiply at full precision on every backend (GPUs and
    TPUs would otherwise round them to tf32 or bfloat16, and tokens would differ from the CPU's).
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        weight[...],
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=out_dtype or x.dtype,
    )


def take_rows(weight: nnx.Param, index: jax.Array) -> jax.Array:
    """Rows `index` [T] of weight [out, in] -> [T, in]; indices must be in range."""
    return _rows(weight[...], index)


@jax.custom_vjp
def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(table, index, axis=0)


def _rows_forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
    return _rows(table, index), (table, index)


def _rows_backward(kept: Any, gradient: jax.Array) -> tuple[jax.Array, None]:
    """For training. A scatter would add the thousands of gradients of a frequent token one after
    the other, rounding each sum; the product with zeros and ones takes no time on a GPU."""
    table, index = kept
    which = jax.nn.one_hot(index, table.shape[0], dtype=gradient.dtype)
    wide = jax.lax.dot_general(
        which,
        gradient,
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if gradient.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return wide.astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)
