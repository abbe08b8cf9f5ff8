"""Products of one token's activations, or a few, with whole matrices, on GPUs. Called by
model/projection.py where switches.py says so.

With so few a matrix product is a read of the matrix, and everything around it (norm, gate,
residual) costs more to launch than to compute: so that lies in the same kernel. Lowered through
Triton. Each program owns a few rows of the matrix and keeps many loads under way; what fills the
memory's latency is how many programs a multiprocessor holds, not a pipeline within one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .attention.gpu_pallas import Launch, call, cdiv, load, program_id, store

MAX_TOKENS = 4
"""More are better off with the tensor cores."""


@dataclass(frozen=True)
class GemvShape:
    """How a product is cut.

    Attributes:
      rows: of the matrix, for each program.
      block: columns per load. 256 for as many rows as warps gives each warp a row of its own,
        which it can add up without the others.
      unroll: loads under way at once.
      num_warps: see Launch.
    """

    rows: int = 4
    block: int = 256
    unroll: int = 8
    num_warps: int = 4


MEASURED_TOKENS = 1
MEASURED = {
    (2048, 1536): GemvShape(unroll=16),
    (17920, 1536): GemvShape(rows=8),
    (1536, 8960): GemvShape(rows=1, block=1024),
}
"""Matrices [out, in] (of gates and values together) of Qwen2.5-1.5B whose products of so many
tokens took less time on an H200 than XLA's, by what surrounds them too, and the best shape
(`tune_products`: by 2.8, 1.6 and 3.7 µs; a decode step takes 1.58 ms so and 1.66 with XLA's).
Others are XLA's: Llama-3.1-8B's were 0.6 to 6 µs faster by themselves, and a step with them took
4.40 ms, not 4.15."""


# Under a jit of its own: traced and lowered once a program, not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "gated", "out_dtype", "shape", "interpret"))
def gemv(
    x: jax.Array,
    weight: jax.Array,
    *,
    scale: jax.Array | None = None,
    eps: float = 0.0,
    gated: bool = False,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    shape: GemvShape | None = None,
    interpret: bool = False,
) -> jax.Array:
    """residual + f(norm(x) · weightᵀ + bias), all in float32, rounded once.

    Args:
      x: [T, K], T at most MAX_TOKENS.
      weight: [N, K].
      scale: [K], of an RMSNorm of x before the product; None: x is taken as it is.
      eps: of that norm.
      gated: the weight is [2·N, K], gates first: f is silu(gate) · up; else f changes nothing.
      bias: [N], or [2·N] with `gated`.
      residual: [T, N].
      out_dtype: of the result; x's where None.

    Returns:
      [T, N].
    """
    num_tokens, size = x.shape
    num_out = weight.shape[0] // (2 if gated else 1)
    shape = shape or GemvShape()
    block = min(shape.block, 1 << (size - 1).bit_length())
    turns, whole = cdiv(size, block), size // block
    scales = None if scale is None else scale[None, :]
    extras = [a for a in (scales, bias, residual) if a is not None]

    def kernel(x_ref: Any, w_ref: Any, *refs: Any) -> None:
        rest = list(refs[:-1])
        scale_ref = None if scale is None else rest.pop(0)
        bias_ref = None if bias is None else rest.pop(0)
        residual_ref = None if residual is None else rest.pop(0)
        out = refs[-1]
        at = program_id(0)
        n = at * shape.rows + jnp.arange(shape.rows)
        real = n < num_out
        halves = (0, num_out) if gated else (0,)

        def turn(at: Any, carry: Any, *, count: int, masked: bool = False) -> Any:
            sums, powers = carry
            columns = [((at + i) * block + jnp.arange(block))[None, :] for i in range(count)]
            masks = [real[:, None] & (c < size) if masked else real[:, None] for c in columns]

            def tile(ref: Any, row: Any, i: int) -> jax.Array:
                row, column = jnp.broadcast_arrays(jnp.asarray(row), columns[i])
                return load(ref, (row, column), jnp.broadcast_to(masks[i], row.shape))

            # All of the matrix comes first, so that its loads are under way together.
            matrix = [[tile(w_ref, n[:, None] + half, i) for half in halves] for i in range(count)]
            for i, tiles in enumerate(matrix):
                # As tiles of equal rows, which costs reads of the L1 cache: a row would have to
                # pass through shared memory and a barrier to get to the threads that need it.
                everywhere = jnp.zeros((shape.rows, 1), jnp.int32)
                factors = None if scale_ref is None else tile(scale_ref, everywhere, i)
                for t in range(num_tokens):
                    value = tile(x_ref, everywhere + t, i).astype(jnp.float32)
                    if factors is not None:
                        powers = _put(powers, t, powers[t] + value * value)
                        value = value * factors.astype(jnp.float32)
                    for j, part in enumerate(tiles, t * len(halves)):
                        sums = _put(sums, j, sums[j] + part.astype(jnp.float32) * value)
            return sums, powers

        zero = jnp.zeros((shape.rows, block), jnp.float32)
        carry: Any = (
            (zero,) * (num_tokens * len(halves)),
            (zero,) * (0 if scale is None else num_tokens),
        )
        rounds = whole // shape.unroll
        if rounds > 1:
            carry = jax.lax.fori_loop(
                0, rounds, lambda i, c: turn(i * shape.unroll, c, count=shape.unroll), carry
            )
        elif rounds:
            carry = turn(0, carry, count=shape.unroll)
        if left := whole - rounds * shape.unroll:
            carry = turn(rounds * shape.unroll, carry, count=left)
        if turns > whole:
            carry = turn(whole, carry, count=1, masked=True)
        sums, powers = carry
        for t in range(num_tokens):
            y = [jnp.sum(sums[t * len(halves) + i], axis=1) for i in range(len(halves))]
            if scale is not None:
                factor = jax.lax.rsqrt(jnp.sum(powers[t], axis=1) / size + eps)
                y = [value * factor for value in y]
            if bias_ref is not None:
                y = [
                    value + load(bias_ref, (n + half,), real, jnp.float32)
                    for value, half in zip(y, halves, strict=True)
                ]
            result = y[0] * jax.nn.sigmoid(y[0]) * y[1] if gated else y[0]
            if residual_ref is not None:
                result = result + load(residual_ref, (t, n), real, jnp.float32)
            store(out, (t, n), result, real)

    (result,) = call(
        kernel,
        Launch(interpret=interpret, num_warps=shape.num_warps, num_stages=1),
        name="gemv",
        grid=(cdiv(num_out, shape.rows),),
        out=[jax.ShapeDtypeStruct((num_tokens, num_out), out_dtype or x.dtype)],
        args=[x, weight, *extras],
        any_rows=True,
    )
    return result


def _put(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])
