"""What a caller asks for and what it gets back, as the engine sees them: token ids, never text.

`SamplingParams` is public (`quire.SamplingParams`); names follow vLLM's where both have a thing.
Whoever makes a `Request` has tokenized the prompt; stop strings are matched after detokenization,
in serving/text.py, which ends the request by `Engine.finish`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Real
from typing import Any, SupportsIndex, cast

from ..errors import InvalidRequest, QuireError, invalid
from ..model.plan import MAX_LOGPROBS, MAX_STOP_IDS, Sampler

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1024
UNLIMITED_TOP_K = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when they end. Checked on construction, which also
    makes numbers of other kinds, such as numpy's, into Python's own.

    Truncation is applied in the order top_k, top_p (over what top_k left, renormalised), min_p,
    each by a value threshold: tokens that tie with the last one kept are kept too.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it. At most 100.
      top_k: keep the k likeliest tokens; 0 or -1 keeps all.
      top_p: keep the likeliest tokens whose probabilities first reach this sum; in (0, 1].
      min_p: drop tokens less likely than min_p times the likeliest; in [0, 1].
      seed: makes the answer repeatable; the stream depends on (seed, choice, token index) alone.
        None draws one.
      max_tokens: at most this many output tokens; None is as many as the context allows.
      min_tokens: stop ids, end-of-sequence and stop strings are held off until this many tokens.
      stop: strings that end the answer, and are not part of it; at most 16.
      stop_token_ids: token ids that end the answer besides the model's own.
      ignore_eos: the model's own end-of-sequence ids do not end the answer.
      logprobs: None for none, else how many alternatives to report per token (0 to 20) beside the
        chosen one. Of the raw distribution, before temperature and truncation.
      skip_special_tokens: leave special tokens out of the text.
      n, best_of, presence_penalty, frequency_penalty, repetition_penalty, logit_bias, bad_words,
      allowed_token_ids, prompt_logprobs: known names that this version does not serve yet; any but
        the neutral value is refused.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._set("temperature", _number("temperature", self.temperature, 0.0, 100.0))
        self._set("top_k", _top_k(self.top_k))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0, above_low=True))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        self._set_whole("seed", -(2**63), 2**64 - 1, or_none=True)
        self._set_whole("max_tokens", 1, 2**31 - 1, or_none=True)
        self._set_whole("min_tokens", 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise invalid("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        self._set_stops()
        self._set_whole("logprobs", 0, MAX_LOGPROBS, or_none=True)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise invalid(name, getattr(self, name), "true or false")
        self._refuse_unserved()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _set_whole(self, name: str, low: int, high: int, *, or_none: bool = False) -> None:
        value = getattr(self, name)
        if value is not None or not or_none:
            self._set(name, _whole(name, value, low, high))

    def _set_stops(self) -> None:
        stop: object = self.stop  # callers may also give one string
        self._set("stop", (stop,) if isinstance(stop, str) else _items("stop", stop, "strings"))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise invalid("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_LENGTH:
                raise invalid("stop", text, f"strings of 1 to {MAX_STOP_STRING_LENGTH} characters")
        ids = _items("stop_token_ids", self.stop_token_ids, "token ids")
        if len(ids) > MAX_STOP_IDS:
            raise invalid("stop_token_ids", f"{len(ids)} ids", f"at most {MAX_STOP_IDS}")
        self._set(
            "stop_token_ids", tuple(_whole("stop_token_ids", token, 0, 2**31 - 1) for token in ids)
        )

    def _refuse_unserved(self) -> None:
        for name, neutral in _UNSERVED.items():
            value = getattr(self, name)
            if not _is_among(value, neutral):
                raise InvalidRequest(
                    f"{name}: got {value!r}; this version of Quire does not serve it, leave it at "
                    f"{neutral[0]!r}"
                )
            self._set(name, neutral[0])

    @property
    def sampler(self) -> Sampler:
        """The poorest step-program ending that honours these parameters."""
        if self.logprobs is not None:
            return Sampler.FULL
        if self.temperature > 0 or self.min_tokens > 0:  # min_tokens masks stop ids
            return Sampler.SAMPLE
        return Sampler.GREEDY


_UNSERVED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (None, 1),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
    "bad_words": ((), [], None),
    "allowed_token_ids": (None, [], ()),
    "prompt_logprobs": (None,),
}
"""Parameters not served yet, with the values at which they ask for nothing; the default first."""


def _is_among(value: object, neutral: tuple[object, ...]) -> bool:
    """`value in neutral`, but true is no 1, and arrays, whose == is no truth value, never are."""
    if isinstance(value, bool):
        return False
    if isinstance(value, Real):
        return any(isinstance(other, Real) and value == other for other in neutral)
    return (value is None or isinstance(value, list | tuple | dict)) and value in neutral


def _number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> float:
    limit = f"a number in {'(' if above_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise invalid(name, value, limit)
    number = cast(float, value)
    if not low <= number <= high or (above_low and number == low):  # not-a-number is never within
        raise invalid(name, value, limit)
    return float(number)


def _whole(name: str, value: object, low: int, high: int) -> int:
    whole = _index(value)
    if whole is None or not low <= whole <= high:
        raise invalid(name, value, f"a whole number from {low} to {high}")
    return whole


def _top_k(value: object) -> int:
    return 0 if _index(value) == UNLIMITED_TOP_K else _whole("top_k", value, 0, 2**31 - 1)


def _index(value: object) -> int | None:
    """A whole number of any kind as Python's own; None if it is none, or true or false."""
    try:
        return None if isinstance(value, bool) else operator.index(cast(SupportsIndex, value))
    except TypeError:
        return None


def _items(name: str, value: Any, of_what: str) -> tuple[Any, ...]:
    """The items of a list, or of any other iterable; None has none."""
    try:
        return () if value is None else tuple(value)
    except TypeError:
        raise invalid(name, value, f"a list of {of_what}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to be generated. Immutable; all that changes lives in the scheduler's Sequence.

    Attributes:
      id: unique among unfinished requests of the engine.
      prompt: token ids, at least one.
      sampling: how tokens are chosen; `seed` must be set by the time it gets here.
      eos_ids: the model's end-of-sequence ids (ignored with `ignore_eos`).
      priority: lower is served first; ties go to the earlier arrival.
      tenant: who asks. Prefixes are not shared between tenants: how fast an answer begins would
        tell one what another has asked.
      deadline: time.monotonic() seconds after which the request ends with DeadlineExceeded.
      adapter: index of a LoRA adapter; only 0, the base model, is served yet.
      cache_salt: prefixes are shared only between requests of equal tenant and salt.
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


class FinishReason(StrEnum):
    """Why a request ended. `STOP` and `LENGTH` are answers; the rest come with an error or none."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output token, natural log, of the raw distribution.

    `top` holds (token id, logprob) pairs, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class RequestOutput:
    """What one engine step gave one request. Nobody changes one after it was made.

    Not frozen, unlike the rest: one is made per row and step, and freezing would triple its cost.

    Attributes:
      request_id: of the Request.
      tokens: new token ids, in order; a stop id that ended the request is included.
      logprobs: one entry a token where asked for, else None.
      finish_reason: None while more will come. Exactly one output of a request has one.
      stop_token: the stop or end-of-sequence id that ended the request, if one did.
      error: set when finish_reason is ERROR.
      cached_tokens: prompt tokens that came from the prefix index (0 until it was admitted).
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: QuireError | None = field(default=None, compare=False)
    cached_tokens: int = 0
