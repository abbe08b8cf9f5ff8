"""Writes a step's keys and values into the slab, in place. Called once per layer, before attention.

The slab is [layers × pages, page, 2·KH, D] with K head h at index 2h and V head h at 2h + 1, so
one token is one contiguous run of memory and one scatter writes both.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def write_kv(
    slab: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, offsets: jax.Array
) -> jax.Array:
    """The slab with each token's K and V at (pages[t], offsets[t]).

    In place when the slab is donated to the enclosing jit (or made in it): XLA then updates the
    buffer and copies nothing. A token whose page or offset is out of range on either side is
    dropped; padding tokens use that, with a page of slab.shape[0] or more. No two other tokens may
    share a (page, offset).

    Args:
      slab: [layers × pages, page, 2·KH, D], a float type.
      k, v: [T, KH, D], cast to the slab's type.
      pages: [T] int32, layer × pages already added.
      offsets: [T] int32, position within the page.

    Raises:
      ValueError: shapes or types that contradict the above.
    """
    num_tokens, num_kv_heads, head_dim = k.shape
    if v.shape != k.shape:
        raise ValueError(f"v: got shape {v.shape}, must be k's, {k.shape}")
    if slab.ndim != 4 or slab.shape[2:] != (2 * num_kv_heads, head_dim):
        raise ValueError(
            f"slab: got shape {slab.shape}, must be [pages, page, {2 * num_kv_heads}, {head_dim}]"
        )
    if not jnp.issubdtype(slab.dtype, jnp.floating):
        raise ValueError(f"slab: got {slab.dtype}, must be a float type")
    for name, index in (("pages", pages), ("offsets", offsets)):
        if index.shape != (num_tokens,) or index.dtype != jnp.int32:
            raise ValueError(
                f"{name}: got {index.dtype}{index.shape}, must be int32 [{num_tokens}]"
            )

    with jax.named_scope("write_kv"):
        num_pages, page_size = slab.shape[:2]
        kv = jnp.stack([k, v], axis=2).reshape(num_tokens, 2 * num_kv_heads, head_dim)
        # A negative index would count from the end, and two equal ones would break the promise of
        # unique indices even where both are dropped: give each dropped token a page of its own.
        inside = (pages >= 0) & (pages < num_pages) & (offsets >= 0) & (offsets < page_size)
        pages = jnp.where(inside, pages, num_pages + jnp.arange(num_tokens, dtype=jnp.int32))
        offsets = jnp.where(inside, offsets, 0)
        return slab.at[pages, offsets].set(kv.astype(slab.dtype), mode="drop", unique_indices=True)
