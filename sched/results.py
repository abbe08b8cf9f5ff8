"""What a row's results mean for its sequence: stop rules and log-probabilities.

Called by the scheduler for each row it collects.
"""

from __future__ import annotations

from ..model.plan import LogprobArrays
from .request import FinishReason, TokenLogprobs
from .sequence import Sequence


def accept(seq: Sequence, sampled: list[int]) -> FinishReason | None:
    """Appends sampled tokens, and returns why they end the request, if they do.

    A device may run past a stop, and past what the host knows to be the last token. That is cut off
    `sampled` here, so it reaches neither a caller nor the prefix index.
    """
    count, left, reason = len(sampled), seq.max_tokens - seq.outputs, None
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
    return tuple(
        TokenLogprobs(
            token=token,
            logprob=float(arrays.chosen[row, at]),
            rank=int(arrays.rank[row, at]),
            top=tuple(
                zip(
                    arrays.top_ids[row, at, :alternatives].tolist(),
                    arrays.top[row, at, :alternatives].tolist(),
                    strict=True,
                )
            ),
        )
        for at, token in enumerate(tokens)
    )
