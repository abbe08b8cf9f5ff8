"""What a caller asks for and what it gets back, as the engine sees them: token ids, never text.

Whoever makes a `Request` has tokenized the prompt; stop strings are matched after detokenization,
in serving/text.py, which ends the choice by `Engine.finish`.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from ..errors import QuireError
from ..model.plan import FloatArray
from .sampling_params import SamplingParams as SamplingParams  # Request's, for whoever makes one

_FEW = 256
"""Ids of which Python knows the largest before NumPy has begun, where that was not used lately."""


def _highest(ids: array[int]) -> int:
    """The largest of some ids, fast: an event loop waits for it."""
    return max(ids) if len(ids) <= _FEW else int(np.frombuffer(ids, np.uintc).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be answered, once or several times (`sampling.choices`). Immutable; all that
    changes lives in the scheduler's Group and its Sequences.

    Attributes:
      id: unique among unfinished requests of the engine.
      prompt: token ids, at least one.
      sampling: how tokens are chosen; by the time it gets here, `seed` must be set and all of
        `bad_words` must be token ids.
      eos_ids: the model's end-of-sequence ids (ignored with `ignore_eos`).
      priority: lower is served first; ties go to the earlier arrival.
      tenant: who asks. Prefixes are not shared between tenants: how fast an answer begins would
        tell one what another has asked.
      deadline: time.monotonic() seconds after which the request ends with DeadlineExceeded.
      adapter: index of a LoRA adapter; only 0, the base model, is served yet.
      cache_salt: prefixes are shared only between requests of equal tenant and salt.
      pooled: asks for the prompt's embedding instead of an answer; `sampling` must then be
        `POOLED_SAMPLING`.
      traceparent: the caller's place in a trace (W3C Trace Context), or empty.
      tracestate: what tracing systems add to that, or empty.
      ids: the prompt as unsigned ints, because it is read several times before the first token;
        None where something in it is none.
      highest: the largest of `ids`; -1 where there are none.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    eos_ids: tuple[int, ...] = ()
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    adapter: int = 0
    cache_salt: str = ""
    pooled: bool = False
    traceparent: str = ""
    tracestate: str = ""
    ids: array[int] | None = field(init=False, repr=False, compare=False)
    highest: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            ids = array("I", self.prompt)  # read three times as fast as signed ones
        except (TypeError, OverflowError):
            ids = None  # limits.py says what is wrong
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "highest", _highest(ids) if ids else -1)


POOLED_SAMPLING = SamplingParams(temperature=0.0, max_tokens=1, seed=0)
"""Of requests for embeddings, which have nothing to choose."""


class FinishReason(StrEnum):
    """Why a request ended. `STOP` and `LENGTH` are answers; the rest come with an error or none."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one token, natural log, of the raw distribution.

    `top` holds (token id, logprob) pairs, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time in the engine went; the three parts add up to all of it.

    Attributes:
      queue_seconds: from its arrival to its first slot (or to its end, if it never got one).
      prefill_seconds: from then to its first token (or to its end).
      decode_seconds: from then to its end.
      preemptions: times an answer of it gave way for want of pages and was computed again, which
        is part of the time in which it happened.
    """

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    preemptions: int = 0

    @property
    def first_token_seconds(self) -> float:
        """From its arrival to its first token, where there was one."""
        return self.queue_seconds + self.prefill_seconds

    @property
    def seconds(self) -> float:
        """From its arrival to its end."""
        return self.queue_seconds + self.prefill_seconds + self.decode_seconds


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended, for those who keep account; does not leave the engine's process.

    Attributes:
      answers: of each choice that was begun the token ids, its prompt's first.
      output_tokens: of all choices.
      ended_at: time.monotonic() seconds.
    """

    request: Request
    answers: tuple[array[int], ...]
    output_tokens: int
    ended_at: float


@dataclass(slots=True)
class RequestOutput:
    """What one engine step gave one choice of a request. Nobody changes one after it was made.

    Not frozen, unlike the rest: one is made per row and step, and freezing would triple its cost.

    Attributes:
      request_id: of the Request.
      tokens: new token ids, in order; a stop id that ended the choice is included.
      cached_tokens: prompt tokens that came from the prefix index (0 until it was admitted).
      choice: which of the request's answers, from 0.
      logprobs: one entry a token where asked for, else None.
      prompt_logprobs: on the first output of choice 0 where asked for: one entry a prompt token,
        None for the first of them.
      pooled: on the only output of a pooled request: float32 [E], the hidden state after the final
        norm at the prompt's last token, scaled to length 1.
      finish_reason: None while more will come. A choice has exactly one output with a reason,
        unless its request ends with an error.
      ended: the request ends with this output; exactly one of its outputs says so. An error ends
        all choices at once.
      stop_token: the stop or end-of-sequence id that ended the choice, if one did.
      error: set when finish_reason is ERROR.
      timing: on the request's last output, unless the engine stopped or failed under it.
      account: with `timing`, in the engine's own process.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    cached_tokens: int = 0
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: QuireError | None = field(default=None, compare=False)
    ended: bool = False
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    pooled: FloatArray | None = field(default=None, compare=False)
    timing: Timing | None = None
    account: Ended | None = None
