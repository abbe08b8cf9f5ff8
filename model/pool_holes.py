"""Room in a GPU's memory pool for what every step brings and leaves, apart from what it works in.

XLA runs a step as a CUDA graph, which holds the addresses of its buffers. One that moved since the
last run is written anew into each of the graph's kernels that uses it, and products are recorded
anew: for a step's working memory that is all of them, before the device can begin (on an H200,
Qwen2.5-1.5B: 0.6 ms at 64 tokens, 1 at 128, 3 at 2,048; for what only the first kernels read 0.15).
The pool hands out the least piece that fits, so with none as small as a step's inputs and outputs,
these are cut off the piece that the working memory is taken from, which then begins elsewhere each
time. So small pieces are left free between others that are held.
"""

from __future__ import annotations

import jax
import numpy as np

from .mesh import Mesh

LARGEST_HOLE = 320 * 1024
"""Bytes. It holds the inputs of a step of 2,048 tokens, whose page tables have an entry for each 16
of a million tokens (291 KB)."""

_SIZES = (LARGEST_HOLE,) * 8 + (64 * 1024,) * 16 + (8 * 1024,) * 32
"""Bytes: more of each than there are buffers of steps in flight."""

_FENCE = 256
"""Bytes, the least that the pool hands out."""


def leave_holes(mesh: Mesh) -> list[jax.Array]:
    """Takes pieces of the pool and gives all but the fences between them back.

    Call it when what lives as long as the engine is there.

    Returns:
      what keeps the holes apart for as long as it is held; none where there are no CUDA graphs.
    """
    if mesh.platform != "gpu":
        return []
    taken = [
        [jax.device_put(np.zeros(size, np.uint8), mesh.everywhere) for size in (hole, _FENCE)]
        for hole in _SIZES
    ]
    jax.block_until_ready(taken)
    return [fence for _, fence in taken]
