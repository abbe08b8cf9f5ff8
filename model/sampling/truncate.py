"""Top-k, top-p and min-p: which tokens a row may draw. Called by choose.py.

Each truncation keeps every token at or above a logit, so tokens that tie with the last one kept are
kept too (ties are common in bfloat16). That logit is found exactly and without sorting the
vocabulary, by building its 32-bit pattern from the highest bits down.

Nothing as large as the logits is kept beside them: what a pass needs of a token it computes from
its logit. On an accelerator memory bounds these passes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 32
_SIGN = np.uint32(1 << (_BITS - 1))
_MINUS_INFINITY = np.uint32(0x007FFFFF)  # in the order of `_float`


def temper(logits: jax.Array, peak: jax.Array, temperature: jax.Array) -> jax.Array:
    """Logits [R, V] less the row's largest [R], by its temperature [R], which is above 0.

    The likeliest is made 0 first: it stays exactly 0 under any temperature, however the compiler
    rounds a quotient that it computes twice, and the others underflow to -inf, not NaN.
    """
    return (logits - peak[:, None]) / temperature[:, None]


def truncate(
    logits: jax.Array,
    peak: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """Which tokens each row may draw.

    Args:
      logits: float32 [R, V]; -inf is never kept. V is below 2**24.
      peak: float32 [R], each row's largest.
      temperature: float32 [R], above 0; probabilities are those of the tempered logits.
      top_k: int32 [R], 0 = off. Keeps logits at or above the k-th largest.
      top_p: float32 [R], 1 = off. Keeps the likeliest down to the first value at which the kept
        mass reaches top_p of what top-k left.
      min_p: float32 [R], 0 = off. Keeps probabilities at or above min_p times the largest.

    Returns:
      bool [R, V]; at least the likeliest token of a row is kept.
    """
    # Two bits a pass: XLA fuses what their three values need into one on an accelerator, where
    # memory bounds it; a CPU has to compute for each value, and takes single bits.
    last = jax.lax.platform_dependent(
        logits, peak, temperature, top_k, top_p,
        cpu=partial(_last_kept, 1), default=partial(_last_kept, 2),
    )  # fmt: skip
    kept = (logits >= last[:, None]) & (logits > -jnp.inf)
    # exp of a tempered logit is the ratio to the likeliest, whatever the normalisation. The
    # likeliest stays all the same: a top_p that float32 rounds to 0 is reached by no tokens at all.
    ratio = jnp.exp(temper(logits, peak, temperature))
    return (kept & (ratio >= min_p[:, None])) | (logits == peak[:, None])


def _last_kept(
    digit_bits: int,
    logits: jax.Array,
    peak: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """The least logit float32 [R] that top-k and top-p keep; -inf where a row uses neither.

    One loop for both, which on a GPU the host runs and waits for: first the rounds of top-k, then
    those of top-p, none of what no row uses. Each is a pass over the vocabulary, which finds the
    next digit, of `digit_bits`, of the largest uint32 at and above which there are enough tokens,
    or is enough of the mass.
    """
    use_k, use_p = top_k > 0, top_p < 1.0
    rounds = _BITS // digit_bits
    for_k, for_p = (jnp.where(jnp.any(use), rounds, 0) for use in (use_k, use_p))

    # Rounds done, what is found, and its bound, all [R]: of arrays of one shape a GPU needs fewest
    # kernels beside the pass.
    State = tuple[jax.Array, jax.Array, jax.Array]

    def is_left(state: State) -> jax.Array:
        return state[0][0] < for_k + for_p  # the same in all rows

    def narrow(state: State) -> State:
        done, found, bound = state
        counts, begins = done < for_k, done == for_k
        # What top-p searches is at or above it. What the rounds of top-k found for a row without
        # (all bits set, for its goal is 0) is dropped here.
        bound = jnp.where(begins & use_k, found, bound)
        found = jnp.where(begins, 0, found)  # the highest bits, the others 0
        shift = jnp.where(counts, done, done - for_k) + 1
        shift = (_BITS - digit_bits * shift).astype(jnp.uint32)
        cuts = [found | (jnp.uint32(digit) << shift) for digit in range(1, 1 << digit_bits)]

        # Sums of ones are exact below 2**24.
        weight = jnp.where(counts[:, None], 1.0, jnp.exp(temper(logits, peak, temperature)))
        total, *above = (
            jnp.sum(
                jnp.where(logits >= _float(jnp.maximum(cut, bound))[:, None], weight, 0.0), axis=-1
            )
            for cut in (bound, *cuts)
        )
        goal = jnp.where(counts, top_k.astype(jnp.float32), top_p * total)
        digit = sum(((mass >= goal).astype(jnp.uint32) for mass in above), jnp.zeros_like(found))
        return done + 1, found | (digit << shift), bound

    nothing = jnp.zeros(len(logits), jnp.uint32)
    first = nothing.astype(jnp.int32), nothing, nothing
    _, found, bound = jax.lax.while_loop(is_left, narrow, first)
    # Where nothing of top-p was searched, what is found is top-k's.
    by_p = jnp.where(use_p, found, 0)
    by_k = jnp.where(use_k, jnp.where(for_p > 0, bound, found), 0)
    return _float(jnp.maximum(by_k, by_p))


def _float(order: jax.Array) -> jax.Array:
    """uint32 -> float32 in the order of the floats: from -inf, which all below it are, to NaNs."""
    order = jnp.maximum(order, _MINUS_INFINITY)
    bits = jnp.where(order >= _SIGN, order ^ _SIGN, ~order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
