"""How `SlotControls` reach the device: packed into int32 buffers for the `controls` program.

    host:    control_buffers(controls, ...) -> int32 [BUFFER_WORDS], as many as it takes
    device:  controls(state, buffer) -> state     (made by `make_fill`, sent before the step)

A buffer has room for a few heads, each of which empties its slot's entry and sets what has a fixed
size, and for entries of the tables over the vocabulary: (table, slot, index, value). The host
counts tokens and gathers bits, so that each index comes once and the device only sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from ..plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_BIASED_TOKENS, SlotControls
from .controls import HISTORY, MAX_COUNT, NO_HISTORY, NO_ID, WORD_BITS, Controls

_HEADS = 4
_ENTRIES = 2048

# Words of a head, in this order.
_FIXED = 5  # slot, what `allowed` starts as, and the penalties
_SECTIONS = (
    _FIXED, MAX_BIASED_TOKENS, MAX_BIASED_TOKENS, MAX_BAD_WORDS * MAX_BAD_WORD_TOKENS, HISTORY
)  # fmt: skip
_HEAD_WORDS = sum(_SECTIONS)
_HEAD_CUTS = list(np.cumsum(_SECTIONS)[:-1])
_HEADS_SIZE = _HEADS * _HEAD_WORDS

BUFFER_WORDS = _HEADS_SIZE + _ENTRIES * 4

Ints = NDArray[np.int32]
AnyInts = NDArray[np.signedinteger[Any]]


class _Table(IntEnum):
    COUNTS = 0
    SEEN = 1
    ALLOWED = 2


def control_buffers(controls: Sequence[SlotControls], num_slots: int) -> Iterator[Ints]:
    """The buffers that set these controls, in the order to send them."""
    for at in range(0, len(controls), _HEADS):
        group = controls[at : at + _HEADS]
        entries = np.concatenate([_entries(c) for c in group])
        for first in range(0, max(len(entries), 1), _ENTRIES):
            yield _buffer(group if first == 0 else (), entries[first : first + _ENTRIES], num_slots)


def empty_buffer(num_slots: int) -> Ints:
    """A buffer that changes nothing."""
    return _buffer((), np.zeros((0, 4), np.int32), num_slots)


def _buffer(heads: Sequence[SlotControls], entries: Ints, num_slots: int) -> Ints:
    buffer = np.zeros(BUFFER_WORDS, np.int32)
    head_rows = buffer[:_HEADS_SIZE].reshape(_HEADS, _HEAD_WORDS)
    head_rows[:, 0] = num_slots  # out of range: dropped
    for row, head in zip(head_rows, heads, strict=False):
        _write_head(head, row)
    entry_rows = buffer[_HEADS_SIZE:].reshape(_ENTRIES, 4)
    entry_rows[:, 1] = num_slots
    entry_rows[: len(entries)] = entries
    return buffer


def _write_head(c: SlotControls, out: Ints) -> None:
    fixed, bias_ids, bias, bad_words, history = np.split(out, _HEAD_CUTS)
    fixed[0], fixed[1] = c.slot, -1 if c.allowed is None else 0
    penalties = (c.repetition_penalty, c.frequency_penalty, c.presence_penalty)
    fixed[2:].view(np.float32)[:] = penalties
    bias_ids[:] = NO_ID
    bias_ids[: len(c.logit_bias)] = [token for token, _ in c.logit_bias]
    bias.view(np.float32)[: len(c.logit_bias)] = [value for _, value in c.logit_bias]
    bad_words[:] = NO_ID
    for words, row in zip(c.bad_words, bad_words.reshape(MAX_BAD_WORDS, -1), strict=False):
        row[-len(words) :] = words
    last = c.output[-HISTORY:]
    history[:] = NO_HISTORY
    history[HISTORY - len(last) :] = last


def _entries(c: SlotControls) -> Ints:
    """[N, 4] what one request puts into the tables."""
    tokens, counts = np.unique(c.output, return_counts=True)
    parts = [_rows(_Table.COUNTS, c.slot, tokens, np.minimum(counts, MAX_COUNT))]
    if c.repetition_penalty != 1.0:
        parts.append(_rows(_Table.SEEN, c.slot, *_bits(c.prompt)))
    if c.allowed is not None:
        parts.append(_rows(_Table.ALLOWED, c.slot, *_bits(c.allowed)))
    return np.concatenate(parts)


def _rows(table: _Table, slot: int, index: AnyInts, value: AnyInts) -> Ints:
    rows = np.empty((len(index), 4), np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = table, slot, index, value
    return rows


def _bits(tokens: Ints) -> tuple[AnyInts, AnyInts]:
    """Which words a set of tokens needs, and their bits."""
    tokens = np.unique(tokens)
    index, first = np.unique(tokens // WORD_BITS, return_index=True)
    bits = np.left_shift(np.uint32(1), (tokens % WORD_BITS).astype(np.uint32))
    words = np.bitwise_or.reduceat(bits, first) if len(tokens) else bits
    return index, words.view(np.int32)


def make_fill() -> Callable[[Controls, jax.Array], Controls]:
    """The `controls` program, to be jitted with its state donated."""

    def fill(state: Controls, buffer: jax.Array) -> Controls:
        heads = buffer[:_HEADS_SIZE].reshape(_HEADS, _HEAD_WORDS)
        fixed, bias_ids, bias, bad_words, history = jnp.split(heads, _HEAD_CUTS, axis=1)
        slot, allowed = fixed[:, 0], fixed[:, 1]
        table, entry_slot, index, value = buffer[_HEADS_SIZE:].reshape(_ENTRIES, 4).T

        def clear(array: jax.Array, fill: jax.Array) -> jax.Array:
            fill = jnp.broadcast_to(fill, (_HEADS, array.shape[1]))
            return array.at[slot].set(fill.astype(array.dtype), mode="drop")

        def put(array: jax.Array, which: _Table) -> jax.Array:
            at = jnp.where(table == which, entry_slot, array.shape[0])
            return array.at[at, index].set(value.astype(array.dtype), mode="drop")

        def replace(array: jax.Array, new: jax.Array) -> jax.Array:
            if array.dtype == jnp.float32:
                new = jax.lax.bitcast_convert_type(new, jnp.float32)
            return array.at[slot].set(new.reshape(_HEADS, *array.shape[1:]), mode="drop")

        return Controls(
            counts=put(clear(state.counts, jnp.int32(0)), _Table.COUNTS),
            seen=put(clear(state.seen, jnp.int32(0)), _Table.SEEN),
            allowed=put(clear(state.allowed, allowed[:, None]), _Table.ALLOWED),
            penalties=replace(state.penalties, fixed[:, 2:]),
            bias_ids=replace(state.bias_ids, bias_ids),
            bias=replace(state.bias, bias),
            bad_words=replace(state.bad_words, bad_words),
            history=replace(state.history, history),
        )

    return fill
