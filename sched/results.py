"""What a row's results mean for its sequence: stop rules, log-probabilities, embeddings.

Called by the scheduler for each row it collects.
"""

from __future__ import annotations

import numpy as np

from ..model.plan import Emit, FloatArray, LogprobArrays, StepOutputs, StepPlan
from .request import FinishReason, RequestOutput, TokenLogprobs
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


def pooled_rows(plan: StepPlan, outputs: StepOutputs, bad: set[int]) -> dict[int, FloatArray]:
    """The pooled hidden state of each row that has one; rows whose is not finite go to `bad`."""
    if outputs.pooled is None:
        return {}
    rows = np.flatnonzero(plan.emits == Emit.POOLED)
    bad.update(rows[~np.isfinite(outputs.pooled).all(axis=1)].tolist())
    return dict(zip(rows.tolist(), outputs.pooled, strict=True))


def embedding_of(seq: Sequence, vector: FloatArray) -> RequestOutput:
    """The one output of a request for an embedding."""
    return RequestOutput(seq.id, cached_tokens=seq.cached_tokens, pooled=vector)


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
