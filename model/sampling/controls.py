"""What reshapes a slot's logits: device state, one entry a slot, and how it is applied.

Penalties, bias, allowed ids and bad words of slots that have a `SlotControls` (model/plan.py). Only
FULL programs take this state; a slot's CONTROLLED word says whether its entry is its own or an
earlier owner's. model/sampling/control_inputs.py fills entries, choose.py applies them, and
model/step.py records what was emitted.

No mask takes a row's last token: allowed ids are never none, and bad words (like the stop ids that
min_tokens holds off) apply only where they leave the row something to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..mesh import Mesh
from ..plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASED_TOKENS

WORD_BITS = 32
NO_ID = -1
"""Fills unused places for token ids; equals no token."""
NO_HISTORY = -2
"""A place in the history before the first output; equals no token, and not NO_ID."""

MAX_COUNT = (1 << 15) - 1
"""Counts stay here rather than wrap."""

HISTORY = MAX_BAD_WORD_TOKENS - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controls:
    """The entries of S slots. V token ids; W = ceil(V / 32)."""

    counts: jax.Array  # int16 [S, V] how often each token is in the output
    seen: jax.Array  # int32 [S, W] bit per token: in the prompt
    allowed: jax.Array  # int32 [S, W] bit per token: may be emitted
    penalties: jax.Array  # float32 [S, 3] repetition, frequency, presence
    bias_ids: jax.Array  # int32 [S, MAX_BIASED_TOKENS] NO_ID where unused
    bias: jax.Array  # float32 [S, MAX_BIASED_TOKENS]
    bad_words: jax.Array  # int32 [S, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS] right-aligned, NO_ID
    history: jax.Array  # int32 [S, HISTORY] the last outputs, latest last

    def rows(self, slot: jax.Array, controlled: jax.Array) -> ControlRows:
        """The entries of `slot` int32 [R]; those not `controlled` bool [R] change nothing."""
        return ControlRows(jax.tree.map(lambda a: a[slot], self), controlled)

    def record(self, slot: jax.Array, tokens: jax.Array) -> Controls:
        """Adds an output token [R] to each `slot` [R]; out-of-range slots are dropped."""
        count = self.counts[slot, tokens]
        count = jnp.where(count < MAX_COUNT, count + 1, count)
        history = jnp.concatenate([self.history[slot, 1:], tokens[:, None]], axis=1)
        return Controls(
            self.counts.at[slot, tokens].set(count, mode="drop"),
            self.seen,
            self.allowed,
            self.penalties,
            self.bias_ids,
            self.bias,
            self.bad_words,
            self.history.at[slot].set(history, mode="drop"),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ControlRows:
    """The entries of the R rows of a step."""

    entries: Controls  # with R in place of S
    controlled: jax.Array  # bool [R]

    def reshape(self, logits: jax.Array, held_off: jax.Array) -> jax.Array:
        """Controls applied to raw logits float32 [R, V] as if in the order that `SlotControls`
        gives, and then `held_off` int32 [R, N] barred.

        One pass over the vocabulary writes, and one counts what is left. For that, bias comes after
        the allowed ids: what is added to -inf changes nothing.
        """
        e, vocab = self.entries, logits.shape[-1]
        row = jnp.arange(logits.shape[0])[:, None]
        repetition, frequency, presence = (p[:, None] for p in e.penalties.T)

        emitted = e.counts > 0
        again = emitted | _bit_per_token(e.seen, vocab)
        divided = jnp.where(logits > 0, logits / repetition, logits * repetition)
        x = jnp.where(again, divided, logits)
        x -= frequency * e.counts.astype(jnp.float32) + presence * emitted.astype(jnp.float32)
        x = jnp.where(_bit_per_token(e.allowed, vocab), x, -jnp.inf)
        x = jnp.where(self.controlled[:, None], x, logits)

        bias_ids, bad_ids = (
            jnp.where(self.controlled[:, None], ids, NO_ID) for ids in (e.bias_ids, self._bad_ids())
        )
        x = x.at[row, _or_dropped(bias_ids, vocab)].add(e.bias, mode="drop")
        return bar(x, bad_ids, held_off)

    def _bad_ids(self) -> jax.Array:
        """Last tokens of bad words whose others were just emitted: int32 [R, MAX_BAD_WORDS]."""
        before, last = self.entries.bad_words[..., :-1], self.entries.bad_words[..., -1]
        matches = (before == self.entries.history[:, None, :]) | (before == NO_ID)
        return jnp.where(jnp.all(matches, axis=-1), last, NO_ID)


def bar(logits: jax.Array, *sets: jax.Array) -> jax.Array:
    """Logits [R, V] without each of the sets int32 [R, N] of ids (negative: none) in turn, unless
    that takes a row's last."""
    row = jnp.arange(len(logits))[:, None]
    # Counted, not looked up afterwards: that would keep a copy of the logits.
    left = jnp.sum(logits > -jnp.inf, axis=-1, dtype=jnp.int32)
    for ids in sets:
        inside = jnp.maximum(ids, 0)
        repeated = (ids[:, :, None] == ids[:, None, :]) & jnp.tri(ids.shape[1], k=-1, dtype=bool)
        taken = (ids >= 0) & (logits[row, inside] > -jnp.inf) & ~jnp.any(repeated, axis=-1)
        fewer = left - jnp.sum(taken, axis=-1, dtype=jnp.int32)
        barred = _or_dropped(jnp.where(fewer[:, None] > 0, ids, NO_ID), logits.shape[-1])
        logits = logits.at[row, barred].set(-jnp.inf, mode="drop")
        left = jnp.where(fewer > 0, fewer, left)
    return logits


def _bit_per_token(words: jax.Array, vocab: int) -> jax.Array:
    """int32 [R, W] -> bool [R, V], token t at bit t % 32 of word t // 32."""
    bits = (words[:, :, None] >> jnp.arange(WORD_BITS)) & 1
    return bits.reshape(len(words), -1)[:, :vocab] != 0


def _or_dropped(ids: jax.Array, vocab: int) -> jax.Array:
    """Negative ids, which would count from the end, become ones that are out of range."""
    return jnp.where(ids < 0, vocab, ids)


def _shapes(num_slots: int, vocab: int) -> Controls:
    words = -(-vocab // WORD_BITS)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((num_slots, *shape), dtype)

    return Controls(
        counts=array(jnp.int16, vocab),
        seen=array(jnp.int32, words),
        allowed=array(jnp.int32, words),
        penalties=array(jnp.float32, 3),
        bias_ids=array(jnp.int32, MAX_BIASED_TOKENS),
        bias=array(jnp.float32, MAX_BIASED_TOKENS),
        bad_words=array(jnp.int32, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
        history=array(jnp.int32, HISTORY),
    )


def abstract_controls(num_slots: int, vocab: int, mesh: Mesh) -> Controls:
    """Shapes, dtypes and placement (a copy on every device), for compiling ahead."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=mesh.everywhere),
        _shapes(num_slots, vocab),
    )


def controls_bytes(num_slots: int, vocab: int) -> int:
    """Device memory of all entries, in bytes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(_shapes(num_slots, vocab)))
