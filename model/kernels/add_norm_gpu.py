"""A sum and its RMSNorm in one kernel, on GPUs. Called by model/projection.py where switches.py
says so.

Before each norm a product is added to the residual stream. For a few tokens XLA cuts the product
into parts that are still to be summed, and makes up to three kernels of all that (sums, mean
square, product with the scale), each of which costs little but its launch. Lowered through Triton;
a token is one program's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .attention.gpu_pallas import Launch, call, load, power_of_2, program_id, store
from .parts import load_sum

_VALUES_PER_THREAD = 8  # 16 bytes of bfloat16: one load
_MOST_WARPS = 16


# Under a jit of its own: traced and lowered once a program, not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def add_norm(
    residual: jax.Array,
    update: jax.Array | None,
    scale: jax.Array,
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(x, RMSNorm(x) · scale) of x = residual + update, which is summed in float32 and rounded; the
    norm of that is computed in float32 and rounded.

    Args:
      residual: [T, E].
      update: [T, E], or [parts, T, E] that are summed first; None: x is the residual.
      scale: [E].
      eps: of the norm.

    Returns:
      Two of [T, E], in the residual's type.
    """
    num_tokens, size = residual.shape
    lanes = power_of_2(size, 32)
    like = jax.ShapeDtypeStruct(residual.shape, residual.dtype)

    def kernel(*refs: Any) -> None:
        inputs, outputs = refs[: len(args)], refs[len(args) :]
        scale_ref, residual_ref, *update_ref = inputs
        *sum_ref, normed_ref = outputs
        e = jnp.arange(lanes)
        at, real = (program_id(0), e), e < size
        x = load(residual_ref, at, real, jnp.float32)
        if update_ref:
            total = (x + load_sum(update_ref[0], at, real)).astype(residual.dtype)
            store(sum_ref[0], at, total, real)
            x = total.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.sum(x * x) / size + eps)
        store(normed_ref, at, x * factor * load(scale_ref, (e,), real, jnp.float32), real)

    args = [scale, residual] if update is None else [scale, residual, update]
    warps = lanes // (32 * _VALUES_PER_THREAD)
    results = call(
        kernel,
        Launch(interpret=interpret, num_warps=max(1, min(warps, _MOST_WARPS)), num_stages=1),
        name="add_norm",
        grid=(num_tokens,),
        out=[like] if update is None else [like, like],
        args=args,
        any_rows=True,
        but_of=[2] if update is not None and update.ndim == 3 else [],  # how many parts
    )
    return (residual, results[0]) if update is None else (results[0], results[1])
