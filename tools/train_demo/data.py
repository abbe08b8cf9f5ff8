"""Turns examples into batches of fixed shape: conversations, packed end to end into rows.

`train.py` draws batches from a `Stream`; `evaluate.py` packs its own questions with `pack`. Loss
falls on the tokens of answers and on the token that ends the turn, nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from .chat import answer, system_turn, user_turn
from .smalltalk import SYSTEM_PROMPTS
from .tasks import TASKS, Example, Split, draw

_SYSTEM_SHARE = 0.2
_ANOTHER_TURN = 0.6  # chance that a conversation goes on


class Batch(NamedTuple):
    """R rows of L tokens. Arrays of the host, or of the device inside a program."""

    tokens: NDArray[np.int32]  # [R, L]
    targets: NDArray[np.int32]  # [R, L], the token that follows
    positions: NDArray[np.int32]  # [R, L], place within the conversation
    segments: NDArray[np.int32]  # [R, L], which conversation of the row
    is_answer: NDArray[np.bool_]  # [R, L], whether the target is to be learned


class Conversation(NamedTuple):
    """Token ids, and which of them the model has to write."""

    ids: list[int]
    is_answer: list[bool]


def encode(tokenizer: Tokenizer, turns: list[Example], system: str | None = None) -> Conversation:
    """A conversation of one or more turns."""
    pieces: list[tuple[str, bool]] = []
    if system is not None:
        pieces.append((system_turn(system), False))
    for turn in turns:
        pieces += [(user_turn(turn.question), False), (answer(turn.answer), True), ("\n", False)]
    # Pieces meet at special tokens and newlines, where no merge crosses: encoding them one by one
    # gives the ids of the whole text.
    encoded = tokenizer.encode_batch([text for text, _ in pieces])
    ids: list[int] = []
    is_answer: list[bool] = []
    for encoding, (_, answered) in zip(encoded, pieces, strict=True):
        ids += encoding.ids
        is_answer += [answered] * len(encoding.ids)
    return Conversation(ids, is_answer)


def pack(conversations: Iterator[Conversation], rows: int, length: int) -> Batch:
    """Fills rows with conversations end to end; the one that runs over the edge is cut there.

    A cut leaves every target right, and no padding. When `conversations` ends early, the rest of
    the rows is zeros of which nothing is learned.
    """
    shape = (rows, length + 1)
    ids, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    is_answer = np.zeros(shape, np.bool_)
    for row in range(rows):
        start, segment = 0, 1
        while start < length and (conversation := next(conversations, None)) is not None:
            here = slice(start, min(start + len(conversation.ids), length + 1))
            count = here.stop - start
            ids[row, here] = conversation.ids[:count]
            positions[row, here] = np.arange(count)
            segments[row, here] = segment
            is_answer[row, here] = conversation.is_answer[:count]
            start, segment = here.stop, segment + 1
    return Batch(ids[:, :-1], ids[:, 1:], positions[:, :-1], segments[:, :-1], is_answer[:, 1:])


class Stream:
    """Endless training batches, the same ones for the same seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int, split: Split = "train"):
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._split = split

    def batch(self, rows: int, length: int, *, one_turn: bool = False) -> Batch:
        return pack(self._conversations(length), rows, length)

    def _conversations(self, length: int) -> Iterator[Conversation]:
        tasks = list(TASKS.values())
        shares = [task.share for task in tasks]
        rng = self._rng
        while True:
            turns = []
            while not turns or rng.random() < _ANOTHER_TURN:
                turns.append(draw(rng.choices(tasks, shares)[0], rng, self._split))
            system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else None
            yield encode(self._tokenizer, turns, system)
