"""A quick look at held-out examples while training goes on. `quire eval` is the real measure.

Greedy decoding writes the expected answer exactly when, after every prefix of it, the likeliest
token is the next one. So one pass over question and answer decides it, with no decoding loop. Where
several answers are right, a model that gives another one counts as wrong here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .batch import unpack
from .data import Place
from .packing import Words
from .train import State, Trainer, cross_entropy

_LEARNED, _RIGHT, _AGREES = 1, 2, 4


class Exam:
    """The same questions each time.

    Args:
      words: [B, T] of held-out examples.
      places: where each is.
    """

    def __init__(self, trainer: Trainer, words: Words, places: Sequence[Place]):
        self._trainer = trainer
        self._words = words
        self._places = places
        self._mark: Callable[..., tuple[jax.Array, jax.Array]] = jax.jit(self._marks)

    def __call__(self, state: State) -> dict[str, Any]:
        """{"loss", "share", "right": {task: [right, n]}, "agrees"}: of the first
        model, and the share of its choices that the last one shares."""
        marked = [self._mark(state.params, words) for words in self._words]
        loss = float(np.mean([float(value) for value, _ in marked]))
        marks = np.stack([np.asarray(each) for _, each in marked])
        right: dict[str, list[int]] = {}
        for place in self._places:
            # The last token of a conversation predicts nothing.
            mine = marks[place.batch, place.start : place.stop - 1]
            counts = right.setdefault(place.task, [0, 0])
            counts[0] += bool(np.all(mine[mine & _LEARNED > 0] & _RIGHT))
            counts[1] += 1
        learned = marks[marks & _LEARNED > 0]
        return {
            "loss": loss,
            "share": sum(r for r, _ in right.values()) / len(self._places),
            "right": dict(sorted(right.items())),
            "agrees": float(np.mean(learned & _AGREES > 0)),
        }

    def _marks(self, params: dict[str, Any], words: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean loss of the first model, and uint8 [T]: what holds at each token."""
        trainer = self._trainer
        first, *_, last = trainer.models
        batch = unpack(words, trainer.recipe.plan.layout)
        logits = trainer.logits(first, params[first], batch)
        chosen = jnp.argmax(logits, axis=-1)
        guessed = jnp.argmax(trainer.logits(last, params[last], batch), axis=-1)
        marks = (
            _LEARNED * batch.learned
            + _RIGHT * (chosen == batch.targets)
            + _AGREES * (chosen == guessed)
        )
        return cross_entropy(logits, batch), marks.astype(jnp.uint8)
