"""What a row's results mean for its sequence: stop rules and log-probabilities.

Called by the scheduler for each row it collects.
"""

from __future__ import annotations

from ..model.plan import LogprobArrays
from .request import FinishReason, TokenLogprobs
from .sequence import Sequence


def accept(seq: Sequence, sampled: list[int]) -> tuple[int, FinishReason | None]:
    """Appends sampled tokens up to the one that ends the request.

    A device may run past a stop, and past tokens that the host knows to be the last; those are
    dropped here, so they never reach a caller nor the prefix index.

    Returns:
      How many of the tokens count, and why the request ends, if it does.
    """
    left = seq.max_tokens - seq.outputs
    count, reason = len(sampled), None
    if count >= left:
        count, reason = left, FinishReason.LENGTH
    if not seq.stop_ids.isdisjoint(sampled):
        # The first min_tokens tokens do not end a request, whatever they are.
        held_off = max(0, seq.request.sampling.min_tokens - seq.outputs)
        for at in range(held_off, count):
            if sampled[at] in seq.stop_ids:
                count, reason = at + 1, FinishReason.STOP
                break
    seq.tokens += sampled if count == len(sampled) else sampled[:count]
    return count, reason


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
