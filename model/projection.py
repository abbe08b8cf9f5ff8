"""A layer's product with a matrix, and what surrounds it. Called by the decoder for all of them.

    residual + f(norm(x) · Wᵀ + b)

One statement, two ways to compute it: in parts, which XLA joins where it can, and, for one token
or a few on a GPU, in one kernel (off: kernels/switches.py). Choosing is the step's business
(model/forward.py); training takes the first.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from .kernels import gemv_gpu, switches
from .mesh import TENSOR
from .weights import contract


class Norm(Protocol):
    """An RMSNorm (model/decoder.py)."""

    eps: float
    scale: Any

    def __call__(self, x: jax.Array) -> jax.Array: ...


class Matrix(Protocol):
    """A weight [out, in], with or without a bias [out].

    Attributes:
      summed: each device has a share of `in`.
    """

    weight: Any
    bias: Any
    summed: bool


class Project(Protocol):
    """Computes residual + f(norm(x) · Wᵀ + b).

    Args:
      x: [T, in].
      matrix: W and b.
      norm: of x; None leaves it as it is.
      gated: the matrix is gates, then as many values: f is silu(gate) · value (SwiGLU,
        arXiv:2002.05202); else f changes nothing.
      residual: [T, out].
      out_dtype: of the result; x's where None.

    Returns:
      [T, out].
    """

    def __call__(
        self,
        x: jax.Array,
        matrix: Matrix,
        *,
        norm: Norm | None = None,
        gated: bool = False,
        residual: jax.Array | None = None,
        out_dtype: Any = None,
    ) -> jax.Array: ...


def in_parts(
    x: jax.Array,
    matrix: Matrix,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """A `Project` for any number of tokens, on any device and any share of the matrix."""
    y = contract(x if norm is None else norm(x), matrix.weight, out_dtype=out_dtype)
    if matrix.summed:
        y = jax.lax.psum(y, TENSOR)
    if matrix.bias is not None:
        y = y + matrix.bias[...]
    if gated:
        gate, value = jnp.split(y, 2, axis=-1)
        y = jax.nn.silu(gate) * value
    return y if residual is None else residual + y


def _in_one_kernel(interpret: bool) -> Project:
    def project(
        x: jax.Array,
        matrix: Matrix,
        *,
        norm: Norm | None = None,
        gated: bool = False,
        residual: jax.Array | None = None,
        out_dtype: Any = None,
    ) -> jax.Array:
        return gemv_gpu.gemv(
            x,
            matrix.weight[...],
            scale=None if norm is None else norm.scale[...],
            eps=0.0 if norm is None else norm.eps,
            gated=gated,
            bias=None if matrix.bias is None else matrix.bias[...],
            residual=residual,
            out_dtype=out_dtype,
            interpret=interpret,
        )

    return project


_FEW_TOKENS: dict[str, Project] = {
    "xla": in_parts,
    "gemv": _in_one_kernel(interpret=False),
    "gemv_interpret": _in_one_kernel(interpret=True),  # for tests, on any device
}
PROJECTIONS = frozenset(_FEW_TOKENS)
"""Ways to multiply one token or a few by a matrix."""


def default_projection(platform: str, dtype: str, shards: int) -> str:
    """One of PROJECTIONS.

    Not for float32: whoever asks for it wants the same tokens in every batch.
    """
    both = platform == "gpu" and dtype != "float32" and shards == 1
    return switches.PROJECTION if both else "xla"


def projection(name: str, num_tokens: int) -> Project:
    """The way for a step of so many tokens, given one of PROJECTIONS."""
    return _FEW_TOKENS[name] if num_tokens <= gemv_gpu.MAX_TOKENS else in_parts
