"""A request in the scheduler: its answers (choices), and what they have in common.

A request of n choices becomes n sequences, one after another: the next one is queued when the
prompt of the one before is scheduled. So the first computes the prompt, and the others find its
full pages in the prefix index; of the last, partial page each computes the tokens itself, which is
less than a page and needs no copy. It also means that a request waits in one place of the queue,
however many answers it is to have.

Made and owned by the scheduler; nobody else writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..kv.prefix import Chain
from ..model.plan import IntArray
from .request import Request, TokenLogprobs
from .sequence import Sequence, stop_ids


@dataclass(slots=True, eq=False)
class Group:
    """A request that has not ended, while `open` has choices in it."""

    request: Request
    arrival: int  # of the first choice; the others have the numbers after it
    submitted: float
    max_tokens: int  # resolved: never None
    chain: Chain  # the first choice's
    is_private: bool = False  # nobody else may find its pages, and they go when it ends

    id: str = field(init=False)
    open: set[int] = field(init=False)  # choices that have not ended, begun or not
    sequences: list[Sequence] = field(init=False, default_factory=list)  # begun choices
    cached_tokens: int = -1  # prompt tokens found in the prefix index; -1 before admission
    scores: list[TokenLogprobs] = field(init=False, default_factory=list)  # of prompt[1:], so far
    scores_due: bool = field(init=False)  # they go out with the first choice's first token

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.scores_due = self.request.sampling.prompt_logprobs is not None
        self.open = set(range(self.request.sampling.choices))

    @property
    def outputs(self) -> int:
        """Output tokens known, of all choices."""
        return sum(seq.outputs for seq in self.sequences)

    def begin_next(self) -> Sequence | None:
        """The next choice's sequence; None when all have begun."""
        choice = len(self.sequences)
        if choice == self.request.sampling.choices:
            return None
        first = self.sequences[0] if choice else None
        seq = Sequence(
            request=self.request,
            arrival=self.arrival + choice,
            max_tokens=self.max_tokens,
            chain=self.chain.fork(len(self.request.prompt)) if first else self.chain,
            choice=choice,
            stop_ids=first.stop_ids if first else stop_ids(self.request),
            allowed=first.allowed if first else _allowed(self.request),
            group=self,
        )
        self.sequences.append(seq)
        return seq

    # ---- log-probabilities of the prompt, which the first choice's rows bring

    @property
    def unscored(self) -> bool:
        """Log-probabilities of prompt tokens are wanted that are not known yet."""
        return self.scores_due and len(self.scores) < len(self.request.prompt) - 1

    def take_scores(self) -> tuple[TokenLogprobs | None, ...]:
        """One entry a prompt token, None for the first; given once, when they are due."""
        self.scores_due = False
        return (None, *self.scores)


def _allowed(request: Request) -> IntArray | None:
    ids = request.sampling.allowed_token_ids
    return None if ids is None else np.array(ids, np.int32)
