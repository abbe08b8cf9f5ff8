"""A plan on its way to the device: packed into one int32 buffer, so that a step is one transfer.

    host:    pack(plan, layout)  -> int32 [layout.size]
    device:  unpack(buffer, layout) -> StepInputs   (static slices; floats travel as their bits)

What a plan changes in the slots (admissions, new pages) rides along: additions to page tables in a
list, and where that is too short, as for a long prefix hit, those of one slot as its whole row. A
plan that needs more, or copies pages, is preceded by the `admit` program (model/step.py).

Everything unused is filled so that the device drops it: slots and destination pages out of range.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from .plan import Bucket, SlotInit, StepPlan
from .slots import SLOT_WORDS, Slots, init_words

_HEADER_WORDS = 2  # rows, decode rows
_ROW_WORDS = 3  # slot, tokens, emit
_INIT_WORDS = 1 + SLOT_WORDS  # slot, then its words

Buffer = NDArray[np.int32]


_UNCHANGED = -1  # an entry of a page-table row that stays as it is


@dataclass(frozen=True, slots=True)
class UpdateRoom:
    """How many slot changes a buffer holds.

    Attributes:
      inits: slots initialised.
      adds: page-table entries, of any slots.
      copies: pages copied.
      row: entries that one slot's row has, where they can be given by index; else 0.
    """

    inits: int
    adds: int
    copies: int = 0
    row: int = 0

    @property
    def parts(self) -> tuple[int, ...]:
        """Words of each part of a buffer: inits, adds, copies, and the row with its slot."""
        row = 1 + self.row if self.row else 0
        return self.inits * _INIT_WORDS, self.adds * 3, self.copies * 2, row

    @property
    def words(self) -> int:
        return sum(self.parts)

    def divide(self, page_adds: Buffer) -> tuple[Buffer, Buffer]:
        """Page-table entries [A, 3] as those that go into the list and those, of one slot, that go
        into the row. The list is too long where not even that makes it fit."""
        if len(page_adds) <= self.adds or not self.row:
            return page_adds, page_adds[:0]
        slots = page_adds[:, 0]
        if (slots == slots[0]).all():  # a prefix hit that comes alone
            return page_adds[:0], page_adds
        apart = slots == np.bincount(slots).argmax()
        return page_adds[~apart], page_adds[apart]


ADMIT_ROOM = UpdateRoom(inits=32, adds=1024, copies=32)
"""Room of one call of the `admit` program."""


@dataclass(frozen=True)
class InputLayout:
    """Where things lie in the buffer of one step program. Made once: each step asks for its room
    and its blank."""

    bucket: Bucket
    page_size: int
    num_slots: int
    pages_per_seq: int

    @cached_property
    def room(self) -> UpdateRoom:
        b = self.bucket
        # Every row may enter a new page; a prompt chunk fills one each page_size tokens.
        adds = b.rows + b.tokens // self.page_size
        if b.decode_only:  # admissions come with a chunk, but where there were no pages for one
            return UpdateRoom(inits=min(b.rows, 8), adds=adds)
        return UpdateRoom(inits=min(b.rows, 32), adds=adds, row=self.pages_per_seq)

    @cached_property
    def size(self) -> int:
        tokens = 0 if self.bucket.decode_only else self.bucket.tokens
        return _HEADER_WORDS + _ROW_WORDS * self.bucket.rows + tokens + self.room.words

    @cached_property
    def blank(self) -> Buffer:
        """The buffer of a step without rows, to be copied: what is unused the device drops."""
        buffer = np.zeros(self.size, np.int32)
        buffer[_HEADER_WORDS : _HEADER_WORDS + self.bucket.rows] = self.num_slots
        buffer[self.size - self.room.words :] = blank_updates(self.room, self.num_slots)
        buffer.flags.writeable = False
        return buffer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotUpdates:
    """Changes to slots, applied before the layers run."""

    inits: jax.Array  # int32 [I, _INIT_WORDS]
    page_adds: jax.Array  # int32 [A, 3] slot, index in its page-table row, page
    page_copies: jax.Array  # int32 [C, 2] source, destination
    row: jax.Array | None  # int32 [1 + M] slot, then a page or _UNCHANGED for each entry of its row


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


def fits(plan: StepPlan, layout: InputLayout) -> bool:
    """Whether all that a plan changes can ride along in the step's own buffer."""
    room = layout.room
    if len(plan.page_copies) or len(plan.inits) > room.inits:
        return False
    return len(room.divide(plan.page_adds)[0]) <= room.adds


def pack(plan: StepPlan, layout: InputLayout) -> Buffer:
    """The plan's rows, tokens and updates; where those do not fit, the caller has sent them ahead.

    The buffer is fresh: a device may still read the last one.
    """
    bucket, rows = layout.bucket, plan.num_rows
    buffer = layout.blank.copy()
    buffer[0], buffer[1] = rows, plan.num_decode
    at = _HEADER_WORDS
    for column in (plan.slots, plan.counts, plan.emits):
        buffer[at : at + rows] = column
        at += bucket.rows
    if not bucket.decode_only:
        first = at + plan.num_decode
        buffer[first : first + len(plan.prompt_tokens)] = plan.prompt_tokens
        at += bucket.tokens
    if plan.inits or len(plan.page_adds):
        _fill_updates(buffer[at:], layout.room, plan.inits, plan.page_adds)
    return buffer


def pack_updates(
    room: UpdateRoom,
    num_slots: int,
    inits: tuple[SlotInit, ...] = (),
    page_adds: Buffer | None = None,
    page_copies: Buffer | None = None,
) -> Buffer:
    """Slot updates by themselves, int32 [room.words]. Must fit the room."""
    buffer = blank_updates(room, num_slots)
    _fill_updates(buffer, room, inits, page_adds, page_copies)
    return buffer


def blank_updates(room: UpdateRoom, num_slots: int) -> Buffer:
    """No updates: slots and destination pages out of range, and a row in which nothing changes."""
    buffer = np.zeros(room.words, np.int32)
    inits, adds, copies, row = _parts(buffer, room)
    inits[:, 0] = adds[:, 0] = num_slots
    copies[:, 1] = -1
    row[1:] = _UNCHANGED
    return buffer


def admit_buffers(plan: StepPlan, num_slots: int) -> Iterator[Buffer]:
    """All that a plan changes, in as many calls of `admit` as it takes."""
    room = ADMIT_ROOM
    at = 0
    while (
        at * room.inits < len(plan.inits)
        or at * room.adds < len(plan.page_adds)
        or at * room.copies < len(plan.page_copies)
    ):
        yield pack_updates(
            room,
            num_slots,
            plan.inits[at * room.inits : (at + 1) * room.inits],
            plan.page_adds[at * room.adds : (at + 1) * room.adds],
            plan.page_copies[at * room.copies : (at + 1) * room.copies],
        )
        at += 1


def _fill_updates(
    buffer: Buffer,
    room: UpdateRoom,
    inits: tuple[SlotInit, ...] = (),
    page_adds: Buffer | None = None,
    page_copies: Buffer | None = None,
) -> None:
    """Writes slot updates into a blank `buffer` [room.words]."""
    init_rows, adds, copies, row = _parts(buffer, room)
    for words, init in zip(init_rows, inits, strict=False):
        words[0] = init.slot
        init_words(init, words[1:])
    if page_adds is not None and len(page_adds):
        listed, apart = room.divide(page_adds)
        adds[: len(listed)] = listed
        if len(apart):
            row[0] = apart[0, 0]
            row[1 + apart[:, 1]] = apart[:, 2]
    if page_copies is not None and len(page_copies):
        copies[: len(page_copies)] = page_copies


def _parts(buffer: Any, room: UpdateRoom) -> tuple[Any, Any, Any, Any]:
    """Views of a buffer's inits [I, _INIT_WORDS], adds [A, 3], copies [C, 2] and row [1 + M]."""
    inits_end, adds_end, copies_end, _ = accumulate(room.parts)
    return (
        buffer[:inits_end].reshape(room.inits, _INIT_WORDS),
        buffer[inits_end:adds_end].reshape(room.adds, 3),
        buffer[adds_end:copies_end].reshape(room.copies, 2),
        buffer[copies_end:],
    )


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
    inits, adds, copies, row = _parts(buffer, room)
    return SlotUpdates(inits, adds, copies, row if room.row else None)


def apply_updates(slots: Slots, updates: SlotUpdates) -> Slots:
    """Initialises slots and adds pages; entries whose slot is out of range are dropped."""
    if updates.row is not None:
        at, row = updates.row[0], updates.row[1:]
        slots = slots.put_row(at, row, row != _UNCHANGED)
    slot, index, page = updates.page_adds.T
    return slots.put(updates.inits[:, 0], updates.inits[:, 1:]).put_pages(slot, index, page)
