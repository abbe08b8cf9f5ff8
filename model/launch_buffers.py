"""What a step is launched with and what it leaves, apart from what it works in. Called by
model/step.py.

XLA runs a step as a CUDA graph, which holds the addresses of its buffers. Inputs arrive at another
place each time, and results are left at another: each kernel that uses one of the two is written
anew before the device can begin, some microseconds of the host's each. Left to itself XLA has
twenty kernels read the inputs, and puts what all layers read where the results will be, for those
come last. So the first kernel copies the inputs, and results have their place from the first to the
last. What a forward tells the program that samples (model/step.py: `which`) is such a result, and
such an input.

    inputs, room = copied_with_room(buffer, rows, words)
    ...
    results = filled(room, packed)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def copied_with_room(buffer: jax.Array, rows: int, words: int) -> tuple[jax.Array, jax.Array]:
    """The int32 [N] that a program is sent, in its working memory, and room for results.

    The room is made before anything that depends on these inputs, and `filled` in place: what is in
    use between the two cannot lie there.

    Returns:
      int32 [N], and int32 [rows + 1, words].
    """
    # One row more: what is overwritten whole need not have been there.
    room = jnp.zeros((rows + 1, words), jnp.int32)
    # One word more, or it would be no copy to XLA.
    inputs, room = jax.lax.optimization_barrier((jnp.pad(buffer, (0, 1)), room))
    return inputs[:-1], room


def filled(room: jax.Array, results: jax.Array) -> jax.Array:
    """The room [R + 1, words] with the results [R, words]; its last row means nothing."""
    return jax.lax.dynamic_update_slice(room, results, (0, 0))
