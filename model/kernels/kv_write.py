"""Writes a step's keys and values into the slab, in place. Called once per layer, before attention.

The slab is [layers × pages, page, 2·KH, D] with K head h at index 2h and V head h at 2h + 1, so
one token is one contiguous run of memory and one scatter writes both. Where XLA's scatter is slow,
a kernel takes its place; rotate_write_gpu.py is one that rotates, too, and so does more than what
is declared here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from . import kv_write_tpu, switches


def _scatter(slab: jax.Array, kv: jax.Array, pages: jax.Array, offsets: jax.Array) -> jax.Array:
    # Two equal indices would break the promise of unique ones even where both are dropped: each
    # dropped token gets a page of its own.
    dropped = slab.shape[0] + jnp.arange(pages.size, dtype=jnp.int32)
    pages = jnp.where(pages < 0, dropped, pages)
    return slab.at[pages, offsets].set(kv, mode="drop", unique_indices=True)


WRITERS: dict[str, Callable[..., jax.Array]] = {
    "scatter": _scatter,
    "tpu": kv_write_tpu.write,
    # For tests, on CPU: races are found, uninitialised memory is NaN, out of bounds raises.
    "tpu_interpret": functools.partial(
        kv_write_tpu.write,
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"),
    ),
}
"""Ways to write kv [T, 2·KH, D] at (pages, offsets); a token whose page is -1 is dropped."""


ROTATING = {"gpu": False, "gpu_interpret": True}
"""Ways to rotate and write in one kernel (rotate_write_gpu.py), and whether it is interpreted (for
tests, on any device). Where it cannot serve, and for `write_kv`, they are "scatter"."""


def default_writer(platform: str, shards: int) -> str:
    """A key of WRITERS or ROTATING for so many devices of "cpu", "gpu" or "tpu"."""
    if platform == "gpu":
        return switches.WRITER if shards == 1 else "scatter"  # several have not run it yet
    return "tpu" if platform == "tpu" else "scatter"


# Traced and lowered once a program and not once a layer.
@functools.partial(jax.jit, static_argnames="writer")
def write_kv(
    slab: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    writer: str = "scatter",
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
      writer: a key of WRITERS or ROTATING.

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

    if writer in ROTATING:
        writer = "scatter"
    if writer not in WRITERS:
        raise ValueError(f"writer: got {writer!r}, must be one of {', '.join(WRITERS)}")

    with jax.named_scope("write_kv"):
        num_pages, page_size = slab.shape[:2]
        kv = jnp.stack([k, v], axis=2).reshape(num_tokens, 2 * num_kv_heads, head_dim)
        inside = (pages >= 0) & (pages < num_pages) & (offsets >= 0) & (offsets < page_size)
        pages = jnp.where(inside, pages, -1)
        offsets = jnp.where(inside, offsets, 0)
        return WRITERS[writer](slab, kv.astype(slab.dtype), pages, offsets)
