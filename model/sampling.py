"""From logits to tokens, per row, on the device, without sorting the vocabulary.

Order: temperature; top-k; top-p over what top-k left, renormalised; min-p; then one draw by the
Gumbel-max trick. Each truncation keeps every token at or above a value threshold, so tokens that
tie with the last one kept are kept too (ties are common in bfloat16). Thresholds are found exactly,
by building the 32-bit pattern of the threshold from its highest bit down.

The random stream of a row depends on (seed, choice, token index) alone: not on the batch, the slot,
the chunking or the number of preemptions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from .plan import MAX_LOGPROBS, Sampler
from .slots import SlotRows

_BITS = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """What sampling gave R rows; log-probabilities only from the FULL sampler."""

    tokens: jax.Array  # int32 [R]
    not_finite: jax.Array  # bool [R]
    logprob: jax.Array | None = None  # float32 [R]
    rank: jax.Array | None = None  # int32 [R]
    top_ids: jax.Array | None = None  # int32 [R, MAX_LOGPROBS]
    top_logprobs: jax.Array | None = None  # float32 [R, MAX_LOGPROBS]


def sample(logits: jax.Array, rows: SlotRows, sampler: Sampler) -> Sampled:
    """One token a row.

    Args:
      logits: float32 [R, V], raw.
      rows: how each row chooses.
      sampler: static; what this program can do (greedy rows are honoured by all).
    """
    not_finite = ~jnp.all(jnp.isfinite(logits), axis=-1)
    if sampler == Sampler.GREEDY:
        return Sampled(_likeliest(logits), not_finite)
    allowed = _hold_off_stops(logits, rows)
    tokens = jnp.where(rows.temperature > 0, _draw(allowed, rows), _likeliest(allowed))
    if sampler == Sampler.SAMPLE:
        return Sampled(tokens, not_finite)
    return _with_logprobs(logits, Sampled(tokens, not_finite))


def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _hold_off_stops(logits: jax.Array, rows: SlotRows) -> jax.Array:
    """Rows that still owe min_tokens cannot choose a stop id."""
    vocab = logits.shape[-1]
    held = (rows.min_remaining > 0)[:, None] & (rows.stop_ids >= 0)
    banned = jnp.where(held, rows.stop_ids, vocab)  # out of range is dropped
    return logits.at[jnp.arange(logits.shape[0])[:, None], banned].set(-jnp.inf, mode="drop")


def _draw(logits: jax.Array, rows: SlotRows) -> jax.Array:
    """A token from each row's truncated, tempered distribution [R, V] -> int32 [R]."""
    # The likeliest is made 0 first: it stays exactly 0 under any temperature, however the compiler
    # rounds a quotient that it computes twice, and the others underflow to -inf, not NaN.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    # A greedy row's temperature of 0 would divide by zero; its draw is not used.
    tempered = shifted / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    kept = truncate(tempered, rows.top_k, rows.top_p, rows.min_p)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(
        row_keys(rows.seed, rows.choice, rows.sample_index)
    )
    return jnp.argmax(jnp.where(kept, tempered + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def row_keys(seed: jax.Array, choice: jax.Array, sample_index: jax.Array) -> jax.Array:
    """The key of each row's next draw, from (seed uint32 [R, 2], choice [R], token index [R])."""

    def one(seed: jax.Array, choice: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, choice), index)

    return jax.vmap(one)(seed, choice, sample_index)


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
    order = _ordered_bits(logits)
    kept = logits > -jnp.inf

    use_k = top_k > 0
    at_least_k = lambda cut: jnp.sum(order >= cut[:, None], axis=-1) >= top_k  # noqa: E731
    kept &= (order >= _largest(at_least_k, use_k)[:, None]) | ~use_k[:, None]

    top = jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.where(kept, jnp.exp(logits - top), 0.0)
    goal = top_p * jnp.sum(mass, axis=-1)
    use_p = top_p < 1.0
    reaches = lambda cut: jnp.sum(jnp.where(order >= cut[:, None], mass, 0.0), -1) >= goal  # noqa: E731
    kept &= (order >= _largest(reaches, use_p)[:, None]) | ~use_p[:, None]

    # exp(logit - top) is the ratio to the likeliest, whatever the normalisation.
    return kept & ((mass >= min_p[:, None]) | (logits == top))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 -> uint32 that sorts the same way (negative patterns reversed, sign flipped)."""
    x = jnp.where(x == 0, 0.0, x)  # -0.0 equals 0.0, but its pattern does not
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << (_BITS - 1))
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(holds: Callable[[jax.Array], jax.Array], wanted: jax.Array) -> jax.Array:
    """Per row the largest uint32 for which `holds`, which is true at 0 and monotone.

    Costs one pass over the vocabulary a bit, and none at all when no row wants it.
    """

    def narrow(i: jax.Array, cut: jax.Array) -> jax.Array:
        candidate = cut | (jnp.uint32(1) << (_BITS - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate), candidate, cut)

    rounds = jnp.where(jnp.any(wanted), _BITS, 0)
    return jax.lax.fori_loop(0, rounds, narrow, jnp.zeros(wanted.shape, jnp.uint32))


def _with_logprobs(logits: jax.Array, sampled: Sampled) -> Sampled:
    """Adds log-probabilities of the raw distribution; rank 1 is the likeliest, ties share one."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, sampled.tokens[:, None], axis=-1)
    width = min(MAX_LOGPROBS, logits.shape[-1])
    top, ids = jax.lax.top_k(logprobs, width)
    missing = ((0, 0), (0, MAX_LOGPROBS - width))  # a vocabulary smaller than MAX_LOGPROBS
    return Sampled(
        sampled.tokens,
        sampled.not_finite,
        logprob=chosen[:, 0],
        rank=1 + jnp.sum(logprobs > chosen, axis=-1).astype(jnp.int32),
        top_ids=jnp.pad(ids.astype(jnp.int32), missing, constant_values=-1),
        top_logprobs=jnp.pad(top, missing, constant_values=-jnp.inf),
    )
