"""Rows of tokens: how a conversation is written as numbers, and how many of them fill a batch.

data.py fills batches here, in worker processes that load no JAX; batch.py reads them on the device.
A batch is one flat row of `Layout.tokens` words, short rows first, so that it travels in one piece
and both lengths are trained in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

Words = np.ndarray
"""uint16: a token's id in the low bits, and two marks above it."""

LEARNED = 1 << 14  # the token is the model's to write; ids are below it
STARTS = 1 << 15  # it is the first of a conversation

_OPEN_ROWS = 32  # looked through for each conversation; more would waste less and take longer


@dataclass(frozen=True)
class Layout:
    """The rows of a batch.

    Attributes:
      parts: (rows, length) of each kind of row, shortest first.
    """

    parts: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(prod(part) for part in self.parts)

    @property
    def longest(self) -> int:
        return self.parts[-1][1]


def to_words(pieces: Sequence[tuple[Sequence[int], bool]]) -> Words:
    """A conversation as words, from (ids, whether the model has to write them) of its pieces."""
    words = np.concatenate(
        [np.array(ids, np.uint16) | np.uint16(LEARNED * learned) for ids, learned in pieces]
    )
    words[0] |= STARTS
    return words


class Packer:
    """Fills `batches` batches with conversations, each whole.

    A conversation goes where the least room is left over, in the shortest rows that it fits; short
    ones fill up long rows when there are no short rows left.
    """

    def __init__(self, layout: Layout, batches: int, padding: int):
        self.layout = layout
        self.batches = batches
        # A padding token is a conversation of its own, so nothing has to know about padding.
        self._rows = [
            _Rows(rows * batches, length, padding | STARTS) for rows, length in layout.parts
        ]

    def place(self, words: Words) -> tuple[int, int, int] | None:
        """Where the conversation now is: (part, row, first column); None if it fits nowhere."""
        for part, rows in enumerate(self._rows):
            if len(words) <= rows.length and (found := rows.place(words)) is not None:
                return (part, *found)
        return None

    def packed(self, order: np.random.Generator | None = None) -> Words:
        """[batches, tokens]; `order` shuffles rows, so that the last batches are like the first."""
        columns = []
        for rows in self._rows:
            words = rows.words if order is None else order.permutation(rows.words)
            columns.append(words.reshape(self.batches, -1))
        return np.concatenate(columns, axis=1)


class _Rows:
    """Rows of one length; a few are open, those before them full enough."""

    def __init__(self, rows: int, length: int, padding: int):
        self.length = length
        self.words = np.full((rows, length), padding, np.uint16)
        self._open: list[tuple[int, int]] = []  # (room, row), least room first
        self._used = 0

    def place(self, words: Words) -> tuple[int, int] | None:
        index = next((i for i, (room, _) in enumerate(self._open) if room >= len(words)), None)
        if index is not None:
            room, row = self._open.pop(index)
        elif self._used < len(self.words):
            room, row = self.length, self._used
            self._used += 1
        else:
            return None
        start = self.length - room
        self.words[row, start : start + len(words)] = words
        self._open.append((room - len(words), row))
        self._open.sort()
        if len(self._open) > _OPEN_ROWS:
            self._open.pop(0)
        return row, start
