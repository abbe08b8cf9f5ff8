"""How often the model is right, measured on instances it was never trained on.

`__main__.py` calls `evaluate` on the rounded weights that are shipped; `card.py` prints the result.
Greedy decoding writes the right answer exactly when, after every prefix of it, the most probable
token is the next one. So one pass over question and answer decides it, with no decoding loop.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from ...model.abstract import AbstractDecoder
from ...model.weights import Params
from .data import Batch, Conversation, Stream, encode, one_per_row
from .model import batch_logits
from .smalltalk import TOPICS
from .tasks import TASKS, Example, draw, plain

_ROWS = 64
_ALONE, _IN_CHAT = 128, 384  # row lengths
_MOST_TURNS_BEFORE = 6


@dataclass(frozen=True)
class Score:
    """Of `asked` questions of a kind, `right` were answered without a wrong token."""

    kind: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked


class Examiner:
    """Scores one set of parameters."""

    def __init__(self, model: AbstractDecoder, params: Params, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._params = params
        self._check: Callable[[Params, Batch], jax.Array] = jax.jit(partial(answers_right, model))

    def alone(self, kind: str, examples: Iterable[Example]) -> Score:
        """Each question in a conversation of its own."""
        return self._score(
            kind, [encode(self._tokenizer, [example]) for example in examples], _ALONE
        )

    def in_chat(self, kind: str, examples: Iterable[Example], seed: int) -> Score:
        """Each question after some others, sometimes under a system prompt."""
        rng, before = random.Random(seed), Stream(self._tokenizer, seed, "held_out")
        conversations = []
        for example in examples:
            turns = [before.example() for _ in range(rng.randint(1, _MOST_TURNS_BEFORE))]
            whole = encode(self._tokenizer, [*turns, example], before.system())
            last = len(encode(self._tokenizer, [example]).ids)
            asked = [False] * (len(whole.ids) - last) + whole.is_answer[-last:]
            conversations.append(Conversation(whole.ids, asked))
        return self._score(kind, conversations, _IN_CHAT)

    def _score(self, kind: str, conversations: list[Conversation], length: int) -> Score:
        right = 0
        for start in range(0, len(conversations), _ROWS):
            some = conversations[start : start + _ROWS]
            padded = some + some[:1] * (_ROWS - len(some))  # one shape, one program
            checked = self._check(self._params, one_per_row(padded, length))
            right += int(jnp.sum(checked[: len(some)]))
        return Score(kind, right, len(conversations))


def answers_right(model: AbstractDecoder, params: Params, batch: Batch) -> jax.Array:
    """bool [R]: whether greedy decoding writes every token marked as an answer."""
    logits = batch_logits(model.bind(params), batch)
    chosen = jnp.argmax(logits, axis=-1).reshape(batch.targets.shape)
    return jnp.all((chosen == batch.targets) | ~batch.is_answer, axis=1)


def evaluate(examiner: Examiner, count: int, seed: int) -> list[Score]:
    """Every task by itself and within conversations, `count` held-out instances each."""
    scores = []
    for task in TASKS.values():
        if task.memorised:
            continue
        rng = random.Random(seed)
        examples = [draw(task, rng, "held_out") for _ in range(count)]
        scores.append(examiner.alone(task.name, examples))
        scores.append(examiner.in_chat(f"{task.name}, in a chat", examples[: count // 2], seed))
    trained = small_talk()
    scores.append(examiner.alone("small talk", trained))
    scores.append(examiner.in_chat("small talk, in a chat", trained, seed))
    scores.append(examiner.alone("small talk, as typed in a hurry", small_talk(hurried=True)))
    scores.append(examiner.alone("small talk, unseen phrasings", small_talk(unseen=True)))
    return scores


def small_talk(*, hurried: bool = False, unseen: bool = False) -> list[Example]:
    """Every question of every topic."""
    return [
        Example("small talk", topic.name, plain(question) if hurried else question, topic.answer)
        for topic in TOPICS
        for question in (topic.unseen if unseen else topic.questions)
    ]
