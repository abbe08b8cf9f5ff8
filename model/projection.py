"""A layer's product with a matrix, and what surrounds it. Called by the decoder for all of them.

    residual + f(norm(x) · Wᵀ + b)

One statement, three ways to compute it: in parts, which XLA joins where it can; with sum and norm
in one kernel between the products, for some dozens of tokens on a GPU; and, for one token or a few,
all in one kernel (kernels/switches.py). Choosing is the step's business (model/forward.py);
training takes the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from .kernels import gemv_gpu, switches
from .kernels.add_norm_gpu import add_norm
from .kernels.parts import product_in_parts, whole
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


def in_one_kernel(interpret: bool, shape: gemv_gpu.GemvShape | None = None) -> Project:
    """A `Project` for up to gemv_gpu.MAX_TOKENS tokens, on a GPU (or interpreted, for tests)."""

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
            shape=shape,
            interpret=interpret,
        )

    return project


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stream:
    """The residual stream behind a product.

    Attributes:
      value: [T, E].
      update: [T, E] what is still to be added to it, or such in parts (kernels/parts.py); None
        where that is done.
    """

    value: jax.Array
    update: jax.Array | None = None

    def rows(self, at: jax.Array) -> Stream:
        """Those [R] of T."""
        update = None if self.update is None else self.update[..., at, :]
        return Stream(self.value[at], update)

    def settled(self) -> jax.Array:
        """[T, E] with all added up."""
        if self.update is None:
            return self.value
        return self.value + whole(self.update, self.value.dtype)


@dataclass(frozen=True)
class Products:
    """How the products of a step are computed, sums and norms between them included.

    Attributes:
      norms: a sum and its norm are one kernel between products, which also sums those in parts;
        else XLA has them with the products.
      alone: matrices [out, in] whose products are one kernel with all that surrounds them, and how
        each is cut.
      interpret: own kernels are evaluated as plain JAX, on any device; for tests.
    """

    norms: bool = False
    alone: tuple[tuple[tuple[int, int], gemv_gpu.GemvShape], ...] = ()
    interpret: bool = False

    def onto(self, residual: jax.Array, y: jax.Array, matrix: Matrix) -> Stream:
        """The residual [T, out] plus the product of y [T, in]."""
        project = self._project(matrix)
        if project is not in_parts or not self.norms:
            return Stream(project(y, matrix, residual=residual))
        return Stream(residual, _maybe_in_parts(y, matrix))

    def of_normed(
        self,
        stream: Stream,
        norm: Norm,
        matrix: Matrix,
        *,
        maybe_in_parts: bool = False,
        **how: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """The stream [T, E] with all added up, and the product of its norm.

        Args:
          stream: what is normed.
          norm, matrix: by what.
          maybe_in_parts: whether the product may be (kernels/parts.py).
          how: `gated` and `out_dtype` of Project.
        """
        project = self._project(matrix)
        if not self.norms or (project is not in_parts and stream.update is None):
            x = stream.settled()
            return x, project(x, matrix, norm=norm, **how)
        x, normed = add_norm(
            stream.value, stream.update, norm.scale[...], eps=norm.eps, interpret=self.interpret
        )
        if project is in_parts and maybe_in_parts:
            return x, _maybe_in_parts(normed, matrix)
        return x, project(normed, matrix, **how)

    def _project(self, matrix: Matrix) -> Project:
        shape = dict(self.alone).get(matrix.weight.shape)
        return in_parts if shape is None else in_one_kernel(self.interpret, shape)


def _maybe_in_parts(x: jax.Array, matrix: Matrix) -> jax.Array:
    # Of one token XLA makes no matrix product when it is told the parts; it still makes its own.
    if matrix.bias is not None or matrix.summed or len(x) == 1:
        return in_parts(x, matrix)
    return product_in_parts(x, matrix.weight[...])


IN_PARTS = Products()
_MEASURED = Products(norms=True, alone=tuple(gemv_gpu.MEASURED.items()))
_BY_TOKENS: dict[str, tuple[tuple[int, Products], ...]] = {
    "xla": (),
    "norms": ((switches.NORM_TOKENS, Products(norms=True)),),
    "gemv": (
        (gemv_gpu.MEASURED_TOKENS, _MEASURED),
        (switches.NORM_TOKENS, Products(norms=True)),
    ),
}
_BY_TOKENS |= {  # for tests, on any device
    f"{name}_interpret": tuple((n, replace(products, interpret=True)) for n, products in steps)
    for name, steps in _BY_TOKENS.items()
    if steps
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
