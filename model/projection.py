"""A layer's product with a matrix, and what surrounds it. Called by the decoder for all of them.

    residual + f(norm(x) · Wᵀ + b)

One statement, three ways to compute it: in parts, which XLA joins where it can; with sum and norm
in one kernel between the products, for some dozens of tokens on a GPU; and, for one token or a few,
all in one kernel (off: kernels/switches.py). Choosing is the step's business (model/forward.py);
training takes the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from .kernels import gemv_gpu, switches
from .kernels.add_norm_gpu import add_norm
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stream:
    """The residual stream behind a product.

    Attributes:
      value: [T, E].
      update: [T, E] what is still to be added to it; None where that is done.
    """

    value: jax.Array
    update: jax.Array | None = None

    def settled(self) -> jax.Array:
        """[T, E] with all added up."""
        return self.value if self.update is None else self.value + self.update


AddNorm = Callable[..., tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Products:
    """How the products of a step are computed, sums and norms between them included.

    Attributes:
      project: one product.
      add_norm: a sum and its norm in one kernel, which then stand between the products, or None:
        they are part of what `project` is asked for.
    """

    project: Project
    add_norm: AddNorm | None = None

    def onto(self, residual: jax.Array, y: jax.Array, matrix: Matrix) -> Stream:
        """The residual [T, out] plus the product of y [T, in]."""
        if self.add_norm is None:
            return Stream(self.project(y, matrix, residual=residual))
        return Stream(residual, self.project(y, matrix))

    def of_normed(
        self, stream: Stream, norm: Norm, matrix: Matrix, **how: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The stream [T, E] with all added up, and the product of its norm.

        Args:
          stream: what is normed.
          norm, matrix: by what.
          how: `gated` and `out_dtype` of Project.
        """
        if self.add_norm is None:
            x = stream.settled()
            return x, self.project(x, matrix, norm=norm, **how)
        x, normed = self.add_norm(stream.value, stream.update, norm.scale[...], eps=norm.eps)
        return x, self.project(normed, matrix, **how)


IN_PARTS = Products(in_parts)
_NORMS_APART, _NORMS_APART_INTERPRETED = (
    Products(in_parts, partial(add_norm, interpret=interpret)) for interpret in (False, True)
)
_ONE_KERNEL, _ONE_KERNEL_INTERPRETED = (
    Products(_in_one_kernel(interpret)) for interpret in (False, True)
)
_BY_TOKENS: dict[str, tuple[tuple[int, Products], ...]] = {
    "xla": (),
    "norms": ((switches.NORM_TOKENS, _NORMS_APART),),
    "gemv": ((gemv_gpu.MAX_TOKENS, _ONE_KERNEL), (switches.NORM_TOKENS, _NORMS_APART)),
    # For tests, on any device.
    "norms_interpret": ((switches.NORM_TOKENS, _NORMS_APART_INTERPRETED),),
    "gemv_interpret": (
        (gemv_gpu.MAX_TOKENS, _ONE_KERNEL_INTERPRETED),
        (switches.NORM_TOKENS, _NORMS_APART_INTERPRETED),
    ),
}
PROJECTIONS = frozenset(_BY_TOKENS)
"""Ways to multiply few tokens by a matrix."""


def default_projection(platform: str, dtype: str, shards: int) -> str:
    """One of PROJECTIONS.

    Not for float32: whoever asks for it wants the same tokens in every batch.
    """
    both = platform == "gpu" and dtype != "float32" and shards == 1
    return switches.PROJECTION if both else "xla"


def projection(name: str, num_tokens: int) -> Products:
    """The way for a step of so many tokens, given one of PROJECTIONS."""
    fitting = (products for limit, products in _BY_TOKENS[name] if num_tokens <= limit)
    return next(fitting, IN_PARTS)
