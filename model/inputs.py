"""A plan on its way to the device: packed into one int32 buffer, so that a step is one transfer.

    host:    pack(plan, layout)  -> int32 [layout.size]
    device:  unpack(buffer, layout) -> StepInputs   (static slices; floats travel as their bits)

What a plan changes in the slots (admissions, new pages) rides along up to a fixed room; a plan that
needs more, or copies pages, is preceded by the `admit` program with the rest (model/step.py).

Everything unused is filled so that the device drops it: slots and destination pages out of range.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import NDArray

from .plan import Bucket, SlotInit, StepPlan
from .slots import SLOT_WORDS, Slots, init_words

_HEADER_WORDS = 2  # rows, decode rows
_ROW_WORDS = 3  # slot, tokens, emit
_INIT_WORDS = 1 + SLOT_WORDS  # slot, then its words

Buffer = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class UpdateRoom:
    """How many slot changes a buffer holds."""

    inits: int
    adds: int
    copies: int = 0

    @property
    def words(self) -> int:
        return self.inits * _INIT_WORDS + self.adds * 3 + self.copies * 2


ADMIT_ROOM = UpdateRoom(inits=32, adds=1024, copies=32)
"""Room of one call of the `admit` program."""


@dataclass(frozen=True, slots=True)
class InputLayout:
    """Where things lie in the buffer of one step program."""

    bucket: Bucket
    page_size: int
    num_slots: int

    @property
    def room(self) -> UpdateRoom:
        b = self.bucket
        # Every row may enter a new page; a prompt chunk fills one each page_size tokens.
        return UpdateRoom(inits=min(b.rows, 8), adds=b.rows + b.tokens // self.page_size)

    @property
    def size(self) -> int:
        tokens = 0 if self.bucket.decode_only else self.bucket.tokens
        return _HEADER_WORDS + _ROW_WORDS * self.bucket.rows + tokens + self.room.words


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotUpdates:
    """Changes to slots, applied before the layers run: first initialisation, then page adds."""

    inits: jax.Array  # int32 [I, _INIT_WORDS]
    page_adds: jax.Array  # int32 [A, 3] slot, index in its page-table row, page
    page_copies: jax.Array  # int32 [C, 2] source, destination


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """A plan as the step program sees it; rows and tokens past the counts are padding."""

    num_rows: jax.Array  # int32 []
    num_decode: jax.Array  # int32 []
    slots: jax.Array  # int32 [R]; num_slots for padding
    counts: jax.Array  # int32 [R]
    emits: jax.Array  # int32 [R]
    prompt_tokens: jax.Array | None  # int32 [T], laid out token for token; None when decode-only
    updates: SlotUpdates


def pack(plan: StepPlan, layout: InputLayout) -> Buffer:
    """The plan's rows, tokens, and as many updates as fit; the caller has sent the rest ahead.

    The buffer is fresh: a device may still read the last one.
    """
    bucket, rows = layout.bucket, plan.num_rows
    buffer = np.zeros(layout.size, np.int32)
    buffer[0], buffer[1] = rows, plan.num_decode
    table = buffer[_HEADER_WORDS : _HEADER_WORDS + _ROW_WORDS * bucket.rows]
    table = table.reshape(_ROW_WORDS, bucket.rows)
    table[0, :rows], table[0, rows:] = plan.slots, layout.num_slots
    table[1, :rows] = plan.counts
    table[2, :rows] = plan.emits
    at = _HEADER_WORDS + table.size
    if not bucket.decode_only:
        first = at + plan.num_decode
        buffer[first : first + len(plan.prompt_tokens)] = plan.prompt_tokens
        at += bucket.tokens
    pack_updates(buffer[at:], layout.room, layout.num_slots, plan.inits, plan.page_adds)
    return buffer


def pack_sample(plan: StepPlan, num_slots: int, rows: int) -> Buffer:
    """What programs that sample need of a plan: [2 * rows] slots, then emits; padding as above."""
    buffer = np.zeros((2, rows), np.int32)
    buffer[0, : plan.num_rows], buffer[0, plan.num_rows :] = plan.slots, num_slots
    buffer[1, : plan.num_rows] = plan.emits
    return buffer.reshape(-1)


def unpack_sample(buffer: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `pack_sample`, while tracing: slots and emits, each int32 [num_rows]."""
    return buffer[:num_rows], buffer[num_rows:]


def pack_updates(
    buffer: Buffer,
    room: UpdateRoom,
    num_slots: int,
    inits: tuple[SlotInit, ...] = (),
    page_adds: NDArray[np.int32] | None = None,
    page_copies: NDArray[np.int32] | None = None,
) -> None:
    """Writes slot updates into `buffer` [room.words], padding included. Must fit the room."""
    init_part, add_part, copy_part = np.split(
        buffer, [room.inits * _INIT_WORDS, room.inits * _INIT_WORDS + room.adds * 3]
    )
    init_rows = init_part.reshape(room.inits, _INIT_WORDS)
    init_rows[:, 0] = num_slots
    for row, init in zip(init_rows, inits, strict=False):
        row[0] = init.slot
        init_words(init, row[1:])
    adds = add_part.reshape(room.adds, 3)
    adds[:, 0] = num_slots
    if page_adds is not None and len(page_adds):
        adds[: len(page_adds)] = page_adds
    copies = copy_part.reshape(room.copies, 2)
    copies[:, 1] = -1
    if page_copies is not None and len(page_copies):
        copies[: len(page_copies)] = page_copies


def unpack(buffer: jax.Array, layout: InputLayout) -> StepInputs:
    """The inverse of `pack`, while tracing."""
    bucket = layout.bucket
    at = _HEADER_WORDS + _ROW_WORDS * bucket.rows
    table = buffer[_HEADER_WORDS:at].reshape(_ROW_WORDS, bucket.rows)
    tokens = None
    if not bucket.decode_only:
        tokens = buffer[at : at + bucket.tokens]
        at += bucket.tokens
    return StepInputs(
        num_rows=buffer[0],
        num_decode=buffer[1],
        slots=table[0],
        counts=table[1],
        emits=table[2],
        prompt_tokens=tokens,
        updates=unpack_updates(buffer[at:], layout.room),
    )


def unpack_updates(buffer: jax.Array, room: UpdateRoom) -> SlotUpdates:
    """The inverse of `pack_updates`, while tracing."""
    adds_at = room.inits * _INIT_WORDS
    copies_at = adds_at + room.adds * 3
    return SlotUpdates(
        inits=buffer[:adds_at].reshape(room.inits, _INIT_WORDS),
        page_adds=buffer[adds_at:copies_at].reshape(room.adds, 3),
        page_copies=buffer[copies_at:].reshape(room.copies, 2),
    )


def apply_updates(slots: Slots, updates: SlotUpdates) -> Slots:
    """Initialises slots, then adds pages; entries whose slot is out of range are dropped."""
    slot, index, page = updates.page_adds.T
    return slots.put(updates.inits[:, 0], updates.inits[:, 1:]).put_pages(slot, index, page)
