"""Top-k, top-p and min-p: which tokens a row may draw. Called by choose.py.

Each truncation keeps every token at or above a value threshold, so tokens that tie with the last
one kept are kept too (ties are common in bfloat16). Thresholds are found exactly and without
sorting the vocabulary, by building the 32-bit pattern of the threshold from its highest bits down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 32
_SIGN = np.uint32(1 << (_BITS - 1))
_MINUS_INFINITY = np.uint32(0x007FFFFF)  # in the order of `_float`


def truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which tokens each row may draw.

    Args:
      logits: float32 [R, V], after temperature; -inf is never kept.
      top_k: int32 [R], 0 = off. Keeps logits at or above the k-th largest.
      top_p: float32 [R], 1 = off. Keeps the likeliest down to the first value at which the kept
        mass reaches top_p of what top-k left.
      min_p: float32 [R], 0 = off. Keeps probabilities at or above min_p times the largest.

    Returns:
      bool [R, V]; at least the likeliest token of a row is kept.
    """
    kept = logits > -jnp.inf

    def at_least(cut: jax.Array) -> jax.Array:
        return logits >= _float(cut)[:, None]

    def enough(cut: jax.Array) -> jax.Array:
        return jnp.sum(at_least(cut), axis=-1) >= top_k

    use_k = top_k > 0
    kept &= at_least(_largest(enough, use_k)) | ~use_k[:, None]

    top = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.where(kept, jnp.exp(logits - top), 0.0)
    goal = top_p * jnp.sum(mass, axis=-1)

    def reaches(cut: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(at_least(cut), mass, 0.0), axis=-1) >= goal

    use_p = top_p < 1.0
    kept &= at_least(_largest(reaches, use_p)) | ~use_p[:, None]

    # exp(logit - top) is the ratio to the likeliest, whatever the normalisation. The likeliest
    # stays all the same: a top_p that float32 rounds to 0 is reached by no tokens at all.
    return (kept & (mass >= min_p[:, None])) | (logits == top)


def _float(order: jax.Array) -> jax.Array:
    """uint32 -> float32 in the order of the floats: from -inf, which all below it are, to NaNs."""
    order = jnp.maximum(order, _MINUS_INFINITY)
    bits = jnp.where(order >= _SIGN, order ^ _SIGN, ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _largest(holds: Callable[[jax.Array], jax.Array], wanted: jax.Array) -> jax.Array:
    """Per row the largest uint32 for which `holds`, which is true at 0 and monotone.

    Costs nothing when no row wants it, else a pass over the vocabulary for each digit. XLA fuses
    what a digit's values need into one pass on a GPU, where memory bounds it; a CPU has to compute
    for each value, and takes single bits.
    """
    return jax.lax.platform_dependent(
        wanted, cpu=partial(_search, holds, 1), default=partial(_search, holds, 2)
    )


def _search(
    holds: Callable[[jax.Array], jax.Array], digit_bits: int, wanted: jax.Array
) -> jax.Array:
    def narrow(i: jax.Array, cut: jax.Array) -> jax.Array:
        shift = (_BITS - digit_bits * (i + 1)).astype(jnp.uint32)
        digit = jnp.zeros_like(cut)
        for value in range(1, 1 << digit_bits):
            digit += holds(cut | (jnp.uint32(value) << shift))
        return cut | (digit << shift)

    rounds = jnp.where(jnp.any(wanted), _BITS // digit_bits, 0)
    return jax.lax.fori_loop(0, rounds, narrow, jnp.zeros(wanted.shape, jnp.uint32))
