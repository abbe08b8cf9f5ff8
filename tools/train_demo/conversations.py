"""From examples to tokens: the chat template, the tokenizer, and several questions in one chat.

Called by data.py in worker processes; loads no JAX. What is trained on is what the shipped template
writes (chat.py), so the model is asked as it was taught.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from ..tasks.example import Example, Message, Split
from ..tasks.registry import TASKS, draw, example_weights
from .chat import pieces
from .packing import Words, to_words

_ALONE_SHARE = 0.6  # of plain examples: the others are turns of a chat
_CHAT_SHARES = 0.04, 0.88  # of the longest row: how long a chat becomes, about
_LAST_TURN = 0.1  # of it: by how much a chat may become longer, so that no example is left over
_THOUGHTS_AFTER_CHAT = 0.3  # of examples with thoughts, where there is a chat to end with them


class Chat(NamedTuple):
    """Messages as the template takes them."""

    task: str  # of the last answer
    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] = ()


class Writer:
    """Writes chats as words."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def write(self, chat: Chat) -> Words:
        # One by one: a batch would be spread over all cores, each of which has a process already.
        return to_words(
            [
                (self._tokenizer.encode(piece.text, add_special_tokens=False).ids, piece.is_answer)
                for piece in pieces(chat.messages, chat.tools)
            ]
        )


class DrawingRates(NamedTuple):
    """What drawing examples takes to know about tasks, by name.

    Attributes:
      weights: how often to draw each, so that it has its share of the tokens.
      density: tokens for each character of its messages.
    """

    weights: dict[str, float]
    density: dict[str, float]


def measure(writer: Writer) -> DrawingRates:
    """Samples every task; the same on every machine."""
    tokens: Counter[str] = Counter()
    characters: Counter[str] = Counter()

    def count(example: Example) -> int:
        length = len(writer.write(alone(example)))
        tokens[example.task] += length
        characters[example.task] += _characters(example)
        return length

    weights = example_weights(count)
    return DrawingRates(weights, {name: tokens[name] / characters[name] for name in weights})


def alone(example: Example) -> Chat:
    return Chat(example.task, example.messages, example.tools)


class Conversations:
    """Endless chats of one split, the same for the same `rng`.

    Every example that is drawn is used, so tasks keep their shares: with tools or a system prompt
    alone, the plain ones alone or as turns of a longer chat.

    Args:
      longest: tokens of the longest row.
      joined: False leaves every example alone.
    """

    def __init__(
        self,
        writer: Writer,
        rates: DrawingRates,
        split: Split,
        rng: random.Random,
        *,
        longest: int,
        joined: bool = True,
    ):
        self._writer = writer
        self._rates = rates
        self._split = split
        self._rng = rng
        self._longest = longest
        self._joined = joined
        self._turns: list[Message] = []  # of the chat at hand
        self._room = 0.0  # tokens it may still grow by

    def __iter__(self) -> Iterator[tuple[Chat, Words]]:
        return ((chat, self._writer.write(chat)) for chat in self._chats())

    def _chats(self) -> Iterator[Chat]:
        tasks = [TASKS[name] for name in self._rates.weights]
        weights = list(self._rates.weights.values())
        while True:
            example = draw(self._rng.choices(tasks, weights)[0], self._rng, self._split)
            if self._joined and _is_plain(example):
                yield from self._join(example)
            else:
                yield alone(example)

    def _join(self, example: Example) -> Iterator[Chat]:
        """Chats that are whole now; the example may wait for more turns."""
        length = self._rates.density[example.task] * _characters(example)
        if example.thinking:  # thoughts stay in a chat's last turn only, so it ends here
            if self._turns and length < self._room and self._rng.random() < _THOUGHTS_AFTER_CHAT:
                yield self._ended(example)
            else:
                yield alone(example)
            return
        if self._rng.random() < _ALONE_SHARE:
            yield alone(example)
            return
        if not self._turns:
            low, high = _CHAT_SHARES
            self._room = self._longest * low * (high / low) ** self._rng.random()
        if length < self._room:
            self._room -= length
            self._turns += example.messages
            return
        short = length < _LAST_TURN * self._longest
        yield self._ended(example) if short else alone(example)

    def _ended(self, example: Example) -> Chat:
        turns, self._turns = self._turns, []
        return Chat(example.task, [*turns, *example.messages])


def _is_plain(example: Example) -> bool:
    """Whether other questions may come before it."""
    return not example.tools and all(
        message["role"] in ("user", "assistant") and "tool_calls" not in message
        for message in example.messages
    )


def _characters(example: Example) -> int:
    return sum(
        len(message.get("content") or "") + len(message.get("reasoning_content") or "") + 1
        for message in example.messages
    )
