"""What changes while a request is served: a Group a request, a Sequence for each of its answers
(choices). Made and owned by the scheduler; nobody else writes them.

A request of n choices becomes n sequences, one after another: the next one is queued when the
prompt of the one before is scheduled. So the first computes the prompt, and the others find its
full pages in the prefix index; of the last, partial page each computes the tokens itself, which is
less than a page and needs no copy. It also means that a request waits in one place of the queue,
however many answers it is to have.

Two counts say how far a running sequence has come:

  prefilled  positions of tokens[:target] whose computation was scheduled; exact.
  unread     most tokens that launched steps may still bring; the host's bound on the position of
             the next decode row is len(tokens) - 1 + unread, and pages are granted by that bound
             (but not beyond `limit`, where the device stops by itself).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..kv.cache import Holding
from ..kv.prefix import Chain
from ..model.plan import IntArray, Sampler
from .request import Ended, Request, Timing, TokenLogprobs
from .tenant import Tenant


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. It waits while `slot` is -1, runs otherwise, until `ended`."""

    request: Request
    arrival: int
    max_tokens: int  # resolved: never None
    chain: Chain
    choice: int
    stop_ids: frozenset[int]
    allowed: IntArray | None  # the only tokens it may emit
    group: Group = field(repr=False)

    # Derived from the request once, because each step looks at them.
    id: str = field(init=False)
    rank: tuple[int, int] = field(init=False)  # order of service
    prompt_len: int = field(init=False)
    limit: int = field(init=False)  # positions that can ever be needed
    sampler: Sampler = field(init=False)
    alternatives: int | None = field(init=False)  # reported a token; None: no log-probabilities
    plain: bool = field(init=False)  # its tokens bring nothing with them
    pooled: bool = field(init=False)  # ends with its prompt's pooled hidden state, not with tokens

    # The prompt, then all output known so far. An array is fast to cut into bytes, and the garbage
    # collector does not walk it.
    tokens: array[int] = field(init=False)
    cached_tokens: int = 0  # prompt tokens the request's first choice found in the prefix index
    recompute_until: int = 0  # positions that were computed before it had to start over
    requeues: int = 0  # device failures survived
    ended: bool = False

    # Set at admission.
    slot: int = -1
    generation: int = 0  # 0: it never ran
    kv: Holding = field(init=False, repr=False)
    target: int = 0  # tokens to prefill: the prompt, and the output known at admission
    prefilled: int = 0
    unread: int = 0
    in_flight: int = 0  # rows launched whose results have not been read

    def __post_init__(self) -> None:
        request = self.request
        self.id = request.id
        self.rank = (request.priority, self.arrival)
        self.prompt_len = len(request.prompt)
        self.limit = self.prompt_len + self.max_tokens - 1  # the last token's KV is never needed
        self.pooled = request.pooled
        self.sampler = Sampler.FULL if request.pooled else request.sampling.sampler
        self.alternatives = request.sampling.alternatives
        self.plain = self.alternatives is None and request.sampling.prompt_logprobs is None
        assert request.ids is not None, "limits.py has looked at it"
        self.tokens = array("i", request.ids.tobytes())

    @property
    def outputs(self) -> int:
        """Output tokens known."""
        return len(self.tokens) - self.prompt_len

    def leave_slot(self) -> None:
        """It does not run any more."""
        self.slot = -1
        self.target = self.prefilled = self.unread = self.in_flight = 0

    @property
    def unscored(self) -> bool:
        """Its rows must still bring log-probabilities of the prompt."""
        return self.choice == 0 and self.group.unscored

    @property
    def prefilling(self) -> bool:
        return self.prefilled < self.target

    @property
    def scheduled(self) -> int:
        """Positions whose computation was scheduled; an upper bound once it decodes."""
        if self.prefilled < self.target:
            return self.prefilled
        at = len(self.tokens) - 1 + self.unread
        return at if at < self.limit else self.limit


@dataclass(slots=True, eq=False)
class Group:
    """A request that has not ended, while `open` has choices in it."""

    request: Request
    tenant: Tenant
    arrival: int  # of the first choice; the others have the numbers after it
    arrived: float  # seconds, as are the others below
    max_tokens: int  # resolved: never None
    chain: Chain  # the first choice's
    is_private: bool = False  # nobody else may find its pages, and they go when it ends

    id: str = field(init=False)
    open: set[int] = field(init=False)  # choices that have not ended, begun or not
    sequences: list[Sequence] = field(init=False, default_factory=list)  # begun choices
    cached_tokens: int = -1  # prompt tokens found in the prefix index; -1 before admission
    admitted: float | None = None  # when its first choice got a slot
    first_token: float | None = None
    preemptions: int = 0
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

    def timing(self, now: float) -> Timing:
        """Where its time went, if it ends now."""
        admitted = now if self.admitted is None else self.admitted
        first = now if self.first_token is None else self.first_token
        return Timing(admitted - self.arrived, first - admitted, now - first, self.preemptions)

    def account(self, now: float) -> Ended:
        """What is known of it when it ends."""
        answers = tuple(seq.tokens for seq in self.sequences)
        return Ended(self.request, answers, self.outputs, now)

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


def richest(sequences: Iterable[Sequence], least: Sampler = Sampler.GREEDY) -> Sampler:
    """The richest sampler that these and `least` need."""
    for seq in sequences:
        if seq.sampler is not least and seq.sampler > least:  # comparing costs more than the rest
            least = seq.sampler
    return least


def stop_ids(request: Request) -> frozenset[int]:
    """The token ids that end a request: its own, and the model's unless it ignores those."""
    own = frozenset(request.sampling.stop_token_ids)
    return own if request.sampling.ignore_eos else own | frozenset(request.eos_ids)


def _allowed(request: Request) -> IntArray | None:
    ids = request.sampling.allowed_token_ids
    return None if ids is None else np.array(ids, np.int32)
