"""prompt_logprobs: log-probabilities of given tokens after positions of a prompt.

    score(params, hidden, buffer) -> int32 [SCORE_ROWS, LOGPROB_WORDS]

Runs after the forward of a FULL step on the hidden states it left, a bounded block of rows at a
time: the logits of a whole prompt at once would take gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .abstract import AbstractDecoder
from .plan import LogprobArrays, StepPlan
from .projection import Stream
from .sampling.logprobs import LOGPROB_WORDS, logprobs_of, unpack_logprobs
from .weights import Params

SCORE_ROWS = 128
SCORE_WORDS = 1 + SCORE_ROWS
"""The buffer: the first position in `hidden`, then the target of each one from there on."""

Score = Callable[[Params, jax.Array, jax.Array], jax.Array]


def make_score(decoder: AbstractDecoder) -> Score:
    """The program, to be jitted."""

    def score(params: Params, hidden: jax.Array, buffer: jax.Array) -> jax.Array:
        at = jnp.minimum(buffer[0] + jnp.arange(SCORE_ROWS), hidden.shape[0] - 1)
        with jax.named_scope("score"):
            logits = decoder.bind(params).logits(Stream(hidden[at]))
            return logprobs_of(logits, buffer[1:])[0].packed()

    return score


def score_buffers(plan: StepPlan) -> Iterator[NDArray[np.int32]]:
    """One buffer a call of `score`, for all scored rows of a plan in turn."""
    first = np.concatenate([[0], np.cumsum(plan.counts)])  # of each row, among the step's tokens
    for scored in plan.scored:
        for at in range(0, len(scored.targets), SCORE_ROWS):
            targets = scored.targets[at : at + SCORE_ROWS]
            buffer = np.zeros(SCORE_WORDS, np.int32)
            buffer[0] = first[scored.row] + at
            buffer[1 : 1 + len(targets)] = targets
            yield buffer


def unpack_scores(blocks: Sequence[NDArray[np.int32]], plan: StepPlan) -> tuple[LogprobArrays, ...]:
    """What the calls of `score` gave, in order, for each scored row of the plan."""
    left = iter(blocks)
    rows = []
    for scored in plan.scored:
        count = len(scored.targets)
        mine = [next(left) for _ in range(0, count, SCORE_ROWS)]
        words = np.concatenate([np.zeros((0, LOGPROB_WORDS), np.int32), *mine])
        rows.append(unpack_logprobs(words[:count]))
    return tuple(rows)
