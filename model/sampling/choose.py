"""From logits to tokens, per row, on the device, without sorting the vocabulary.

Order: the slot's controls, in FULL programs (controls.py); stop ids that are held off; temperature;
top-k; top-p over what top-k left, renormalised; min-p (truncate.py); then one draw by the
Gumbel-max trick. Log-probabilities are of the logits as they came.

The random stream of a row depends on (seed, choice, token index) alone: not on the batch, the slot,
the chunking or the number of preemptions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from ..plan import Sampler
from ..slots import SlotRows
from .controls import NO_ID, Controls, bar
from .logprobs import Logprobs, logprobs_of
from .truncate import temper, truncate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """What sampling gave R rows; log-probabilities only from the FULL sampler."""

    tokens: jax.Array  # int32 [R]
    not_finite: jax.Array  # bool [R]
    logprobs: Logprobs | None = None
    spent: jax.Array | None = None  # float32 [R, V] the logits that it worked in; not from GREEDY


LEAST_AT_ONCE = 64
"""Rows that are sampled at a time, at least: with fewer, starting kernels takes longer than what
they do."""


def rows_at_once(num_slots: int) -> int:
    """Rows that an engine's FULL programs sample at a time, off GPUs SAMPLE, too: a quarter of
    those it may run. They work in two arrays as large as the logits they are given: for 256 rows of
    Qwen2.5's vocabulary 311 MB, which pages can use better."""
    return max(LEAST_AT_ONCE, num_slots // 4)


def part_size(count: int, at_once: int) -> int:
    """Rows of each part that so many are cut into: `at_once` at most, or nearly as many, as `count`
    can be divided; where it cannot, all."""
    divisors = (n for n in range(min(at_once, count), at_once // 4, -1) if count % n == 0)
    return next(divisors, count)


def sample(
    logits: jax.Array,
    rows: SlotRows,
    sampler: Sampler,
    controls: Controls | None = None,
    slot: jax.Array | None = None,
    at_once: int | None = None,
) -> Sampled:
    """One token a row. SAMPLE and FULL overwrite logits, in place where those are donated.

    Args:
      logits: float32 [R, V], raw.
      rows: how each row chooses.
      sampler: static; what this program can do (greedy rows are honoured by all).
      controls: of all slots; reshape the logits of rows that are controlled; for FULL.
      slot: int32 [R] whose row each is; with `controls`.
      at_once: static; rows that are sampled at a time at most, if R can be divided (`part_size`);
        None: all. Each row's result is its own, but for how XLA rounds sums of other shapes.
    """
    count, size = len(logits), len(logits)
    if at_once is not None and sampler != Sampler.GREEDY:
        size = part_size(count, at_once)
    if size == count:
        return _sample(logits, rows, sampler, controls, slot)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(count // size, size, *x.shape[1:])

    def some(part: tuple[jax.Array, SlotRows, jax.Array | None]) -> Sampled:
        # Else XLA joins the cut with the search for the likeliest tokens, which that of JAX 0.12
        # then cannot place.
        logits, rows, slot = jax.lax.optimization_barrier(part)
        return replace(_sample(logits, rows, sampler, controls, slot), spent=None)

    sampled: Sampled = jax.lax.map(some, jax.tree.map(cut, (logits, rows, slot)))
    whole = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), sampled)
    return replace(whole, spent=logits)


def _sample(
    logits: jax.Array,
    rows: SlotRows,
    sampler: Sampler,
    controls: Controls | None,
    slot: jax.Array | None,
) -> Sampled:
    not_finite = ~jnp.all(jnp.isfinite(logits), axis=-1)
    if sampler == Sampler.GREEDY:
        return Sampled(_likeliest(logits), not_finite)
    # Rows that still owe min_tokens cannot choose a stop id.
    held_off = jnp.where((rows.min_remaining > 0)[:, None], rows.stop_ids, NO_ID)
    if controls is not None and slot is not None:
        shaped = controls.rows(slot, rows.controlled).reshape(logits, held_off)
    else:
        shaped = bar(logits, held_off)
    tokens = _choose(shaped, rows)
    if sampler != Sampler.FULL:
        return Sampled(tokens, not_finite, spent=shaped)
    return Sampled(tokens, not_finite, *logprobs_of(logits, tokens))


def _choose(logits: jax.Array, rows: SlotRows) -> jax.Array:
    likeliest = _likeliest(logits)
    peak = jnp.take_along_axis(logits, likeliest[:, None], axis=-1)[:, 0]
    return jnp.where(rows.temperature > 0, _draw(logits, peak, rows), likeliest)


def _likeliest(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _draw(logits: jax.Array, peak: jax.Array, rows: SlotRows) -> jax.Array:
    """A token from each row's truncated, tempered distribution [R, V] -> int32 [R]; `peak` float32
    [R] is each row's largest logit."""
    # A greedy row's temperature of 0 would divide by zero; its draw is not used.
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    kept = truncate(logits, peak, temperature, rows.top_k, rows.top_p, rows.min_p)
    tempered = temper(logits, peak, temperature)
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
