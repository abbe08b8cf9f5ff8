"""What a row's results mean for its sequence: stop rules and log-probabilities.

Called by the scheduler for each row it collects.
"""

from __future__ import annotations

import numpy as np

from ..model.plan import LogprobArrays
from .request import FinishReason, TokenLogprobs
from .sequence import Group, Sequence


def accept(seq: Sequence, sampled: list[int]) -> FinishReason | None:
    """Appends sampled tokens, and returns why they end the request, if they do.

    A device may run past a stop, and past what the host knows to be the last token. That is cut off
    `sampled` here, so it reaches neither a caller nor the prefix index.
    """
    count, left, reason = len(sampled), seq.limit + 1 - len(seq.tokens), None
    if count >= left:
        count, reason = left, FinishReason.LENGTH
    if not seq.stop_ids.isdisjoint(sampled):
        # The first min_tokens tokens do not end a request, whatever they are.
        held_off = max(0, seq.request.sampling.min_tokens - seq.outputs)
        for at in range(held_off, count):
            if sampled[at] in seq.stop_ids:
                count, reason = at + 1, FinishReason.STOP
                break
    del sampled[count:]
    seq.tokens.extend(sampled)
    return reason


def logprobs_of(
    arrays: LogprobArrays, row: int, tokens: list[int], alternatives: int
) -> tuple[TokenLogprobs, ...]:
    """The log-probabilities of a row's tokens, with as many alternatives as were asked for."""
    return tuple(_entry(arrays, (row, at), token, alternatives) for at, token in enumerate(tokens))


def gather_scores(group: Group, start: int, targets: list[int], arrays: LogprobArrays) -> bool:
    """Takes in the log-probabilities of the prompt tokens after positions `start`, `start` + 1, …

    Those that are known already (their rows ran again after a preemption) are passed over.

    Returns:
      whether all of them are finite.
    """
    alternatives = group.request.sampling.prompt_logprobs or 0
    known = len(group.scores) - start
    assert known >= 0, "rows of one sequence are collected in order"
    group.scores.extend(
        _entry(arrays, (at, 0), targets[at], alternatives) for at in range(known, len(targets))
    )
    return bool(np.isfinite(arrays.chosen).all())


def _entry(
    arrays: LogprobArrays, at: tuple[int, int], token: int, alternatives: int
) -> TokenLogprobs:
    return TokenLogprobs(
        token=token,
        logprob=float(arrays.chosen[at]),
        rank=int(arrays.rank[at]),
        top=tuple(
            zip(
                arrays.top_ids[at][:alternatives].tolist(),
                arrays.top[at][:alternatives].tolist(),
                strict=True,
            )
        ),
    )
