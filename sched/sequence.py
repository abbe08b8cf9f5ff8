"""What changes while one answer is made. Made and owned by the scheduler; nobody else writes it.

Two counts say how far a running sequence has come:

  prefilled  positions of tokens[:target] whose computation was scheduled; exact.
  unread     most tokens that launched steps may still bring; the host's bound on the position of
             the next decode row is len(tokens) - 1 + unread, and pages are granted by that bound
             (but not beyond `limit`, where the device stops by itself).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..kv.cache import Holding
from ..kv.prefix import Chain
from ..model.plan import IntArray, Sampler
from .request import Request

if TYPE_CHECKING:
    from .group import Group


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

    # The prompt, then all output known so far. An array is hashed fast, and the garbage collector
    # does not walk it.
    tokens: array[int] = field(init=False)
    cached_tokens: int = 0  # prompt tokens the request's first choice found in the prefix index
    recompute_until: int = 0  # positions that were computed before a preemption
    requeues: int = 0  # device failures survived
    ended: bool = False

    # Set at admission.
    slot: int = -1
    generation: int = 0
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
        self.sampler = request.sampling.sampler
        self.alternatives = request.sampling.alternatives
        self.tokens = array("i", request.prompt)

    @property
    def outputs(self) -> int:
        """Output tokens known."""
        return len(self.tokens) - self.prompt_len

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
        if self.prefilling:
            return self.prefilled
        return min(len(self.tokens) - 1 + self.unread, self.limit)


def stop_ids(request: Request) -> frozenset[int]:
    """The token ids that end a request: its own, and the model's unless it ignores those."""
    own = frozenset(request.sampling.stop_token_ids)
    return own if request.sampling.ignore_eos else own | frozenset(request.eos_ids)
