"""From a layer's product to queries, and keys and values in the slab, in one kernel, on GPUs.
Called by model/forward.py where switches.py says so.

    bias, norms of q and k, rotation, K and V into the slab's pages, in place

XLA makes two to six kernels of that. Lowered through Triton; each program owns a few heads of a
token, and reads each of them as its two halves, which turn into each other (rope.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .attention.gpu_pallas import Launch, call, cdiv, load, power_of_2, program_id, store
from .parts import load_sum


@dataclass(frozen=True)
class RotateShape:
    """How the work is cut.

    Attributes:
      heads: of a token, for each program.
      num_warps: see Launch.
    """

    heads: int = 8
    num_warps: int = 4


def serves(slab: jax.Array, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the slab holds heads as they are (not as tiles of a TPU need them), in halves."""
    return slab.shape[2:] == (2 * num_kv_heads, head_dim) and head_dim % 2 == 0


# Under a jit of its own: traced and lowered once a program, not once a layer.
@functools.partial(jax.jit, static_argnames=("num_kv_heads", "dtype", "eps", "shape", "interpret"))
def rotate_write(
    product: jax.Array,
    slab: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    first_page: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    num_kv_heads: int,
    dtype: Any,
    bias: jax.Array | None = None,
    norms: tuple[jax.Array, jax.Array] | None = None,
    eps: float = 0.0,
    shape: RotateShape | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rotated queries, and the slab with rotated keys and values at (first_page + pages[t],
    offsets[t]); all in float32, rounded once.

    In place when the slab is donated to the enclosing jit (or made in it). A token whose page is
    below 0, or whose place is outside of the slab, is dropped; no two others may share a place.

    Args:
      product: [T, (H + 2·KH) · D], queries, then keys, then values; or [parts, ...] that are
        summed first.
      slab: [layers × pages, page, 2·KH, D], a float type.
      rotation: cos and sin of each token, float32 [T, 1, D / 2].
      first_page: int32 [1], of the layer.
      pages, offsets: int32 [T].
      bias: [(H + 2·KH) · D], added first.
      norms: scales [D] of RMSNorms over each query and key.
      eps: of these.
      dtype: of the queries.

    Returns:
      q [T, H, D] in `dtype`, and the slab.
    """
    num_tokens, width = product.shape[-2:]
    num_pages, page_size, _, head_dim = slab.shape
    all_heads, half = width // head_dim, head_dim // 2
    num_heads = all_heads - 2 * num_kv_heads
    turning = num_heads + num_kv_heads
    shape = shape or RotateShape()
    block, lanes = min(shape.heads, power_of_2(all_heads)), power_of_2(half)
    cos, sin = rotation
    extras = [] if bias is None else [bias]
    extras += [] if norms is None else list(norms)
    args = [product, cos, sin, first_page, pages, offsets, *extras, slab]

    def kernel(*refs: Any) -> None:
        inputs, (q_ref, slab_ref) = list(refs[: len(args)]), refs[len(args) :]
        product_ref, cos_ref, sin_ref, first_ref, pages_ref, offsets_ref, *rest = inputs[:-1]
        bias_ref = None if bias is None else rest.pop(0)
        t = program_id(0)
        h = (program_id(1) * block + jnp.arange(block))[:, None]
        d = jnp.arange(lanes)[None, :]
        real = (h < all_heads) & (d < half)
        columns = (h * head_dim + d, h * head_dim + half + d)
        x = [load_sum(product_ref, (t, c), real) for c in columns]
        if bias_ref is not None:
            x = [
                a + load(bias_ref, (c,), real, jnp.float32) for a, c in zip(x, columns, strict=True)
            ]
        if rest:
            power = jnp.sum(x[0] * x[0] + x[1] * x[1], axis=1) / head_dim
            factor = jax.lax.rsqrt(power + eps)[:, None]
            of_q, of_k = rest
            for i, place in enumerate((d, d + half)):
                place = jnp.broadcast_to(place, real.shape)
                scale = jnp.where(
                    h < num_heads,
                    load(of_q, (place,), real, jnp.float32),
                    load(of_k, (place,), real, jnp.float32),
                )
                x[i] = jnp.where(h < turning, x[i] * factor * scale, x[i])
        d_all = jnp.broadcast_to(d, real.shape)
        c, s = (load(ref, (t, 0, d_all), real, jnp.float32) for ref in (cos_ref, sin_ref))
        turned = (x[0] * c - x[1] * s, x[1] * c + x[0] * s)
        page, offset = pages_ref[t], offsets_ref[t]
        to = first_ref[0] + page
        inside = (page >= 0) & (to < num_pages) & (offset >= 0) & (offset < page_size)
        lane = jnp.where(h < turning, 2 * (h - num_heads), 2 * (h - turning) + 1)
        for i, place in enumerate((d, d + half)):
            y = jnp.where(h < turning, turned[i], x[i])
            store(q_ref, (t, h, place), y, real & (h < num_heads))
            store(slab_ref, (to, offset, lane, place), y, real & (h >= num_heads) & inside)

    q, slab = call(
        kernel,
        Launch(interpret=interpret, num_warps=shape.num_warps, num_stages=1),
        name="rotate_write",
        grid=(num_tokens, cdiv(all_heads, block)),
        out=[
            jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype),
            jax.ShapeDtypeStruct(slab.shape, slab.dtype),
        ],
        args=args,
        aliases={len(args) - 1: 1},
        any_rows=True,
        but_of=[0] if product.ndim == 3 else [],  # how many parts
    )
    return q, slab
