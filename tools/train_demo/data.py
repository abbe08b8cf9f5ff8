"""Turns examples into batches of fixed shape: conversations, packed end to end into rows.

`train.py` draws batches from a `Stream`; `evaluate.py` lays its questions out with `one_per_row`.
Loss falls on the tokens of answers and on the token that ends the turn, nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from .chat import answer, system_turn, user_turn
from .tasks import TASKS, Example, Split, draw, system_prompt

_SYSTEM_SHARE = 0.2
_TOKENS_PER_TURN = 32  # about; says how many turns a conversation needs to reach across a row


class Batch(NamedTuple):
    """R rows of L tokens."""

    tokens: jax.Array  # int32 [R, L]
    targets: jax.Array  # int32 [R, L], the token that follows
    positions: jax.Array  # int32 [R, L], place within the conversation
    segments: jax.Array  # int32 [R, L], which conversation of the row; 0 is padding
    is_answer: jax.Array  # bool [R, L], whether the target is the model's to write


class Conversation(NamedTuple):
    """Token ids, and which of them the model has to write."""

    ids: list[int]
    is_answer: list[bool]


def encode(
    tokenizer: Tokenizer, turns: Sequence[Example], system: str | None = None
) -> Conversation:
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

    A cut leaves every target right, and no padding.
    """
    filled = []
    for _ in range(rows):
        row: list[Conversation] = []
        while sum(len(conversation.ids) for conversation in row) <= length:
            row.append(next(conversations))
        filled.append(row)
    return _lay_out(filled, length)


def one_per_row(conversations: Iterable[Conversation], length: int) -> Batch:
    """Each conversation alone in a row, padded. None may be longer than the row."""
    rows = [[conversation] for conversation in conversations]
    longest = max(len(row[0].ids) for row in rows)
    if longest > length + 1:
        raise ValueError(f"conversation of {longest} tokens in a row of {length}")
    return _lay_out(rows, length)


def _lay_out(rows: list[list[Conversation]], length: int) -> Batch:
    shape = (len(rows), length + 1)  # one more, as the last target
    ids, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    is_answer = np.zeros(shape, np.bool_)
    for row, conversations in enumerate(rows):
        start = 0
        for segment, conversation in enumerate(conversations, start=1):
            count = min(len(conversation.ids), length + 1 - start)
            here = slice(start, start + count)
            ids[row, here] = conversation.ids[:count]
            positions[row, here] = np.arange(count)
            segments[row, here] = segment
            is_answer[row, here] = conversation.is_answer[:count]
            start += count
    return Batch(
        tokens=jnp.asarray(ids[:, :-1]),
        targets=jnp.asarray(ids[:, 1:]),
        positions=jnp.asarray(positions[:, :-1]),
        segments=jnp.asarray(segments[:, :-1]),
        is_answer=jnp.asarray(is_answer[:, 1:]),
    )


class Stream:
    """Endless conversations of one split, the same ones for the same seed."""

    def __init__(self, tokenizer: Tokenizer, seed: int, split: Split = "train"):
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._split = split
        self._tasks = list(TASKS.values())
        self._shares = [task.share for task in self._tasks]

    def batch(self, rows: int, length: int) -> Batch:
        """The next batch: conversations from one turn to about as many as a row holds."""
        most_turns = max(1, length // _TOKENS_PER_TURN)
        return pack(self._conversations(most_turns), rows, length)

    def example(self) -> Example:
        """The next example, of any task."""
        task = self._rng.choices(self._tasks, self._shares)[0]
        return draw(task, self._rng, self._split)

    def _conversations(self, most_turns: int) -> Iterator[Conversation]:
        while True:
            turns = [self.example() for _ in range(self._rng.randint(1, most_turns))]
            yield encode(self._tokenizer, turns, self.system())

    def system(self) -> str | None:
        """A system prompt, or more often none."""
        if self._rng.random() < _SYSTEM_SHARE:
            return system_prompt(self._rng)
        return None
