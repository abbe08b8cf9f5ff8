"""Products of a few dozen tokens' activations with whole matrices, on GPUs. No program has
them yet: only tools/tune_products calls them.

Up to some 64 tokens a product takes as long as reading the matrix does, if enough of it is on its
way at any time, and a launch costs as much as a small product: so norm, gate and residual are part
of the kernel, as in gemv_gpu.py. The matrix is cut by rows and, where those are too few to fill the
device, by columns, too: who finishes last of those that share rows adds up what all found, always
in the same order. Lowered through Triton, which pipelines the loads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .attention.gpu_pallas import (
    Launch,
    add_one,
    call,
    cdiv,
    dot,
    load,
    power_of_2,
    program_id,
    store,
    when,
)

MAX_TOKENS = 64


@dataclass(frozen=True)
class GemmShape:
    """How a product is cut.

    Attributes:
      rows: of the matrix, for each program.
      block: columns per turn of the loop.
      programs: that fill the device; columns are cut until there are about as many.
      least_turns: a part has at least about this many turns.
      num_warps, num_stages: see Launch.
    """

    rows: int = 64
    block: int = 128
    programs: int = 132
    least_turns: int = 4
    num_warps: int = 4
    num_stages: int = 4

    def parts(self, num_rows: int, size: int) -> int:
        """Into how many parts the columns of a matrix [num_rows, size] are cut."""
        tiles, turns = cdiv(num_rows, self.rows), cdiv(size, self.block)
        return max(1, min(self.programs // tiles, turns // self.least_turns))


# Under a jit of its own: traced and lowered once a program, not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "gated", "out_dtype", "shape", "interpret"))
def gemm(
    x: jax.Array,
    weight: jax.Array,
    *,
    scale: jax.Array | None = None,
    eps: float = 0.0,
    gated: bool = False,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    shape: GemmShape | None = None,
    interpret: bool = False,
) -> jax.Array:
    """residual + f(norm(x) · weightᵀ + bias), but for the factors of the product in float32.

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
    shape = shape or GemmShape()
    halves = (0, num_out) if gated else (0,)
    width, block = power_of_2(num_tokens, 16), shape.block
    tiles, parts = cdiv(num_out, shape.rows), shape.parts(num_out, size)
    turns = cdiv(cdiv(size, block), parts)
    extras = [a for a in (scale, bias, residual) if a is not None]
    # Whoever finishes last leaves its counter at zero again: to XLA, the kernel only reads them.
    counters = [jnp.zeros(tiles, jnp.int32)] if parts > 1 else []

    def kernel(x_ref: Any, w_ref: Any, *refs: Any) -> None:
        inputs = list(refs[: len(extras) + len(counters)])
        out, *partial = refs[len(inputs) :]
        scale_ref = None if scale is None else inputs.pop(0)
        bias_ref = None if bias is None else inputs.pop(0)
        residual_ref = None if residual is None else inputs.pop(0)
        tile, part = program_id(0), program_id(1)
        t = jnp.arange(width)
        real = t < num_tokens
        n = tile * shape.rows + jnp.arange(shape.rows)
        inside = n < num_out
        grid = real[:, None] & inside[None, :]

        def turn(at: jax.Array, carry: Any) -> Any:
            sums, powers = carry
            c = (part * turns + at) * block + jnp.arange(block)
            there = c < size
            values = load(x_ref, (t[:, None], c[None, :]), real[:, None] & there[None, :])
            factors = values
            if scale_ref is not None:
                wide = values.astype(jnp.float32)
                powers = powers + jnp.sum(wide * wide, axis=1)
                factor = load(scale_ref, (c,), there, jnp.float32)
                factors = (wide * factor[None, :]).astype(values.dtype)
            sums = tuple(
                total
                + dot(
                    factors,
                    load(w_ref, (n[:, None] + half, c[None, :]), inside[:, None] & there[None, :]),
                    b_transposed=True,
                )
                for total, half in zip(sums, halves, strict=True)
            )
            return sums, powers

        def finish(sums: Any, powers: jax.Array) -> None:
            y = list(sums)
            if scale_ref is not None:
                factor = jax.lax.rsqrt(powers / size + eps)
                y = [value * factor[:, None] for value in y]
            if bias_ref is not None:
                y = [
                    value + load(bias_ref, (n + half,), inside, jnp.float32)[None, :]
                    for value, half in zip(y, halves, strict=True)
                ]
            result = y[0] * jax.nn.sigmoid(y[0]) * y[1] if gated else y[0]
            place = (t[:, None], n[None, :])
            if residual_ref is not None:
                result = result + load(residual_ref, place, grid, jnp.float32)
            store(out, place, result, grid)

        zero = jnp.zeros((width, shape.rows), jnp.float32)
        carry = ((zero,) * len(halves), jnp.zeros(width, jnp.float32))
        sums, powers = jax.lax.fori_loop(0, turns, turn, carry)
        if parts == 1:
            finish(sums, powers)
            return

        (counter_ref,), (sums_ref, powers_ref) = inputs, partial

        def place(which: Any, i: int) -> tuple[Any, ...]:
            return which, i, t[:, None], n[None, :]

        for i, total in enumerate(sums):
            store(sums_ref, place(part, i), total, grid)
        store(powers_ref, (part, tile, t), powers, real)

        @when(add_one(counter_ref, tile, interpret=interpret) == parts - 1)
        def _() -> None:
            def add(at: jax.Array, carry: Any) -> Any:
                sums, powers = carry
                found = [load(sums_ref, place(at, i), grid) for i in range(len(halves))]
                sums = tuple(a + b for a, b in zip(sums, found, strict=True))
                return sums, powers + load(powers_ref, (at, tile, t), real)

            finish(*jax.lax.fori_loop(0, parts, add, carry))
            counter_ref[tile] = jnp.int32(0)

    out_shape = [
        jax.ShapeDtypeStruct((num_tokens, num_out), out_dtype or x.dtype),
    ]
    if parts > 1:
        out_shape += [
            jax.ShapeDtypeStruct((parts, len(halves), num_tokens, num_out), jnp.float32),
            jax.ShapeDtypeStruct((parts, tiles, num_tokens), jnp.float32),
        ]
    result, *_ = call(
        kernel,
        Launch(interpret=interpret, num_warps=shape.num_warps, num_stages=shape.num_stages),
        name="gemm",
        grid=(tiles, parts),
        out=out_shape,
        args=[x, weight, *extras, *counters],
    )
    return result
