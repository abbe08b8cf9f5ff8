"""Device state of running requests: one entry a slot, donated through every step.

The next step reads a slot's last token and position here, on the device, so launching step N+1
never waits for the tokens of step N. What the host knows of a position is an upper bound.

All scalars of a slot lie side by side in one int32 row (floats as their bits): admitting a slot,
reading the rows of a step and moving them on are then one gather or scatter each, where a dozen
arrays would take a dozen kernels a step. `SlotRows` gives the words their names back.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .mesh import Mesh
from .plan import MAX_STOP_IDS, SlotInit

NO_TOKEN = -1
"""Fills unused stop ids; equals no token."""


class Word(IntEnum):
    """Where each scalar lies in a slot's row. Those up to SAMPLE_INDEX change every step."""

    LAST_TOKEN = 0
    POSITION = 1
    REMAINING = 2
    MIN_REMAINING = 3
    SAMPLE_INDEX = 4
    CHOICE = 5
    SEED_HIGH = 6
    SEED_LOW = 7
    TOP_K = 8
    ADAPTER = 9
    CONTROLLED = 10
    TEMPERATURE = 11  # float32, as are the next two
    TOP_P = 12
    MIN_P = 13
    STOP_IDS = 14  # MAX_STOP_IDS words


_MOVING = ("last_token", "position", "remaining", "min_remaining", "sample_index")
SLOT_WORDS = Word.STOP_IDS + MAX_STOP_IDS
_WORDS = struct.Struct(f"=6i2I3i3f{MAX_STOP_IDS}i")
"""A slot's row on the host, as `Word` names it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """S slots. A slot whose REMAINING is 0 is frozen: its rows write, emit and change nothing."""

    words: jax.Array  # int32 [S, SLOT_WORDS]
    page_table: jax.Array  # int32 [S, M] page of each page-sized stretch; 0 where unused

    @property
    def num_slots(self) -> int:
        return self.words.shape[0]

    def rows(self, slot: jax.Array) -> SlotRows:
        """The state of `slot` int32 [R]; out-of-range slots read as the last one."""
        return SlotRows(self.words[slot])

    def put(self, slot: jax.Array, words: jax.Array) -> Slots:
        """Writes `words` [R, SLOT_WORDS] to `slot` [R]; out-of-range slots are dropped."""
        return Slots(self.words.at[slot].set(words, mode="drop"), self.page_table)

    def put_pages(self, slot: jax.Array, index: jax.Array, page: jax.Array) -> Slots:
        """Sets page-table entries (slot, index), each [A]; out-of-range slots are dropped."""
        return Slots(self.words, self.page_table.at[slot, index].set(page, mode="drop"))

    def put_row(self, slot: jax.Array, pages: jax.Array, changed: jax.Array) -> Slots:
        """Sets those of the entries of `slot` [] that are `changed` bool [M] to `pages` [M]. For a
        long row: a scatter takes an accelerator without wide ones a moment for each entry."""
        old = jax.lax.dynamic_index_in_dim(self.page_table, slot, keepdims=False)
        row = jnp.where(changed, pages, old)
        table = jax.lax.dynamic_update_index_in_dim(self.page_table, row, slot, 0)
        return Slots(self.words, table)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotRows:
    """The state of the R slots that a step runs, by name. Each is [R] unless said otherwise."""

    words: jax.Array  # int32 [R, SLOT_WORDS]

    def _int(self, word: Word) -> jax.Array:
        return self.words[:, word]

    def _float(self, word: Word) -> jax.Array:
        return jax.lax.bitcast_convert_type(self.words[:, word], jnp.float32)

    @property
    def last_token(self) -> jax.Array:
        """Input of the next decode row."""
        return self._int(Word.LAST_TOKEN)

    @property
    def position(self) -> jax.Array:
        """Where that token goes: the tokens whose KV is in the pages."""
        return self._int(Word.POSITION)

    @property
    def remaining(self) -> jax.Array:
        """Output tokens still allowed; 0 is frozen."""
        return self._int(Word.REMAINING)

    @property
    def min_remaining(self) -> jax.Array:
        """Above 0: so many more output tokens may not be a stop id."""
        return self._int(Word.MIN_REMAINING)

    @property
    def sample_index(self) -> jax.Array:
        """Index of the next output token."""
        return self._int(Word.SAMPLE_INDEX)

    @property
    def choice(self) -> jax.Array:
        return self._int(Word.CHOICE)

    @property
    def seed(self) -> jax.Array:
        """uint32 [R, 2], high word first."""
        words = self.words[:, Word.SEED_HIGH : Word.SEED_LOW + 1]
        return jax.lax.bitcast_convert_type(words, jnp.uint32)

    @property
    def top_k(self) -> jax.Array:
        """0 is off."""
        return self._int(Word.TOP_K)

    @property
    def adapter(self) -> jax.Array:
        """0 is the base model, which is all the decoder serves yet."""
        return self._int(Word.ADAPTER)

    @property
    def controlled(self) -> jax.Array:
        """bool; the slot's entry in `Controls` is its own."""
        return self._int(Word.CONTROLLED) != 0

    @property
    def temperature(self) -> jax.Array:
        """float32; 0 is greedy."""
        return self._float(Word.TEMPERATURE)

    @property
    def top_p(self) -> jax.Array:
        """float32; 1 is off."""
        return self._float(Word.TOP_P)

    @property
    def min_p(self) -> jax.Array:
        """float32; 0 is off."""
        return self._float(Word.MIN_P)

    @property
    def stop_ids(self) -> jax.Array:
        """int32 [R, MAX_STOP_IDS]; NO_TOKEN where unused."""
        return self.words[:, Word.STOP_IDS :]

    def moved(self, **changed: jax.Array) -> jax.Array:
        """The rows' words with new values for some of those that move, [R, SLOT_WORDS]."""
        moving = [changed.get(name, getattr(self, name)) for name in _MOVING]
        assert changed.keys() <= set(_MOVING)
        rest = self.words[:, len(_MOVING) :]
        return jnp.concatenate([jnp.stack(moving, axis=1), rest], axis=1)


def init_words(init: SlotInit, out: NDArray[np.int32]) -> None:
    """Writes the words of a freshly admitted slot to `out` [SLOT_WORDS], on the host."""
    seed = init.seed & (2**64 - 1)
    unused = MAX_STOP_IDS - len(init.stop_ids)
    _WORDS.pack_into(
        out.data,
        0,
        NO_TOKEN,  # the first decode row's token comes from the prompt's last row
        init.position,
        init.remaining,
        init.min_remaining,
        init.sample_index,
        init.choice,
        seed >> 32,
        seed & 0xFFFFFFFF,
        init.top_k,
        init.adapter,
        init.controlled,
        init.temperature,
        init.top_p,
        init.min_p,
        *init.stop_ids,
        *[NO_TOKEN] * unused,
    )


def abstract_slots(num_slots: int, pages_per_seq: int, mesh: Mesh) -> Slots:
    """Shapes, dtypes and placement (a copy on every device), for compiling ahead."""

    def array(width: int) -> Any:
        sharding = mesh.of(("slots", None))
        return jax.ShapeDtypeStruct((num_slots, width), jnp.int32, sharding=sharding)

    return Slots(words=array(SLOT_WORDS), page_table=array(pages_per_seq))
