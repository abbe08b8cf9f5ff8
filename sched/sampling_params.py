"""`SamplingParams` (`quire.SamplingParams`): how tokens are chosen, checked as far as that can be
without a model. What needs one (the vocabulary, the context) is checked in limits.py.

Made by callers and by serving/intake.py; names follow vLLM's where both have a thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from ..errors import invalid
from ..model.plan import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASED_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_IDS,
    Sampler,
)
from .checks import index, items, number, whole

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 1024
MAX_BAD_WORD_LENGTH = 256
MAX_CHOICES = 128
"""Answers to one request, as in OpenAI's API."""
MAX_ALLOWED = 1 << 20
"""Entries of allowed_token_ids: more than any vocabulary has."""
MAX_BIAS = 100.0
MAX_ID = 2**31 - 1
UNLIMITED_TOP_K = -1


@dataclass(frozen=True, slots=True)
class Limit:
    """What a parameter may be.

    Attributes:
      low, high: of a number, or of each number in a list or mapping.
      above_low: `low` itself is not allowed.
      entries: of a list or mapping, at most.
      characters: of each text, at most.
    """

    low: float | None = None
    high: float | None = None
    above_low: bool = False
    entries: int | None = None
    characters: int | None = None


LIMITS: Mapping[str, Limit] = {
    "temperature": Limit(0, 100),
    "top_k": Limit(0, MAX_ID),
    "top_p": Limit(0, 1, above_low=True),
    "min_p": Limit(0, 1),
    "repetition_penalty": Limit(0, 10, above_low=True),
    "presence_penalty": Limit(-2, 2),
    "frequency_penalty": Limit(-2, 2),
    "logit_bias": Limit(-MAX_BIAS, MAX_BIAS, entries=MAX_BIASED_TOKENS),
    "allowed_token_ids": Limit(0, MAX_ID, entries=MAX_ALLOWED),
    "bad_words": Limit(0, MAX_ID, entries=MAX_BAD_WORDS, characters=MAX_BAD_WORD_LENGTH),
    "seed": Limit(-(2**63), 2**64 - 1),
    "max_tokens": Limit(1, MAX_ID),
    "min_tokens": Limit(0, MAX_ID),
    "stop": Limit(entries=MAX_STOP_STRINGS, characters=MAX_STOP_STRING_LENGTH),
    "stop_token_ids": Limit(0, MAX_ID, entries=MAX_STOP_IDS),
    "logprobs": Limit(0, MAX_LOGPROBS),
    "prompt_logprobs": Limit(0, MAX_LOGPROBS),
    "n": Limit(1, MAX_CHOICES),
    "best_of": Limit(1, MAX_CHOICES),
}
"""Of the parameters that have any; what a model and others' values add is not in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when they end. Checked on construction, which also
    makes numbers of other kinds, such as numpy's, into Python's own.

    Logits are changed in the order penalties, logit_bias, allowed_token_ids, bad_words,
    temperature. Truncation is then applied in the order top_k, top_p (over what top_k left,
    renormalised), min_p, each by a value threshold: tokens that tie with the last one kept are kept
    too.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it. At most 100.
      top_k: keep the k likeliest tokens; 0 or -1 keeps all.
      top_p: keep the likeliest tokens whose probabilities first reach this sum; in (0, 1].
      min_p: drop tokens less likely than min_p times the likeliest; in [0, 1].
      repetition_penalty: divides the logits of tokens in prompt or answer if they are positive,
        multiplies them if negative; in (0, 10], 1 is off.
      presence_penalty: subtracted once from the logit of each token in the answer; in [-2, 2].
      frequency_penalty: subtracted as often as the token is in the answer; in [-2, 2].
      logit_bias: {token id: added to its logit}; in [-100, 100], at most 300 tokens.
      allowed_token_ids: no other token is emitted; None allows all.
      bad_words: texts, or token-id sequences, that the answer must not contain. A text counts with
        and without a space before it. At most 64 sequences of at most 8 tokens in all. One that
        would leave no token to choose does not apply there.
      seed: makes the answer repeatable; the stream depends on (seed, choice, token index) alone.
        None draws one.
      max_tokens: at most this many output tokens; None is as many as the context allows.
      min_tokens: stop ids, end-of-sequence and stop strings are held off until this many tokens.
      stop: strings that end the answer, and are not part of it; at most 16.
      stop_token_ids: token ids that end the answer besides the model's own.
      ignore_eos: the model's own end-of-sequence ids do not end the answer.
      logprobs: None for none, else how many alternatives to report per token (0 to 20) beside the
        chosen one. Of the raw distribution, before all that is above.
      prompt_logprobs: the same for each token of the prompt but the first. Such a request finds
        nothing in the prefix index, because all of its prompt must be computed.
      n: answers to return, 1 to 128; they differ by their random streams, so greedy ones are equal.
      best_of: answers to make, of which the n with the highest sum of log-probabilities (raw, of
        the chosen tokens) are returned, best first; None is n. Above n it cannot be streamed.
      skip_special_tokens: leave special tokens out of the text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, default, made_plain in _CHECKS:
            value = getattr(self, name)
            if value is not default:  # most are, and a lone request's first token waits for this
                object.__setattr__(self, name, made_plain(name, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise invalid("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.best_of is not None and self.best_of < self.n:
            raise invalid("best_of", self.best_of, f"at least n ({self.n})")

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with another seed, which nothing else depends on, and so nothing is checked
        again."""
        made = object.__new__(SamplingParams)
        for name, _, _ in _CHECKS:
            object.__setattr__(made, name, getattr(self, name))
        object.__setattr__(made, "seed", _whole("seed", seed))
        if self.logit_bias:  # which whoever made these may change
            object.__setattr__(made, "logit_bias", {**self.logit_bias})
        return made

    @property
    def choices(self) -> int:
        """Answers to make."""
        return self.n if self.best_of is None else self.best_of

    @property
    def ranked(self) -> bool:
        """More answers are made than returned."""
        return self.choices > self.n

    @property
    def controlled(self) -> bool:
        """Logits are reshaped before temperature and truncation."""
        return (
            (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
            or bool(self.logit_bias)
            or self.allowed_token_ids is not None
            or bool(self.bad_words)
        )

    @property
    def alternatives(self) -> int | None:
        """Alternatives the engine reports a token; None for no log-probabilities at all."""
        return 0 if self.logprobs is None and self.ranked else self.logprobs

    @property
    def sampler(self) -> Sampler:
        """The poorest step-program ending that honours these parameters for output tokens."""
        if self.controlled or self.alternatives is not None:
            return Sampler.FULL
        if self.temperature > 0 or self.min_tokens > 0:  # min_tokens masks stop ids
            return Sampler.SAMPLE
        return Sampler.GREEDY


def _number(name: str, value: object) -> float:
    limit = LIMITS[name]
    assert limit.low is not None and limit.high is not None
    return number(name, value, limit.low, limit.high, above_low=limit.above_low)


def _whole(name: str, value: object) -> int:
    limit = LIMITS[name]
    assert limit.low is not None and limit.high is not None
    return whole(name, value, int(limit.low), int(limit.high))


def _whole_or_none(name: str, value: object) -> int | None:
    return None if value is None else _whole(name, value)


def _true_or_false(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, value, "true or false")
    return value


def _top_k(name: str, value: object) -> int:
    return 0 if index(value) == UNLIMITED_TOP_K else _whole(name, value)


def _stop_ids(name: str, value: object) -> tuple[int, ...]:
    return _ids(name, value, MAX_STOP_IDS)


def _ids(name: str, value: object, most: int) -> tuple[int, ...]:
    """At most so many token ids; counted first, because to look at each takes time."""
    ids = items(name, value, "token ids")
    if len(ids) > most:
        raise invalid(name, f"{len(ids)} ids", f"at most {most}")
    return tuple(whole(name, token, 0, MAX_ID) for token in ids)


def _stop_strings(name: str, value: object) -> tuple[str, ...]:
    """The stop strings; callers may also give one."""
    stop = (value,) if isinstance(value, str) else items(name, value, "strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise invalid(name, f"{len(stop)} strings", f"at most {MAX_STOP_STRINGS}")
    for text in stop:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_STRING_LENGTH:
            raise invalid(name, text, f"strings of 1 to {MAX_STOP_STRING_LENGTH} characters")
    return stop


def _logit_bias(name: str, value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise invalid(name, value, "a mapping from token ids to numbers")
    if len(value) > MAX_BIASED_TOKENS:
        raise invalid(name, f"{len(value)} tokens", f"at most {MAX_BIASED_TOKENS}")
    return {
        whole(name, token, 0, MAX_ID): number(f"{name}[{token}]", bias, -MAX_BIAS, MAX_BIAS)
        for token, bias in value.items()
    }


def _allowed(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    ids = tuple(dict.fromkeys(_ids(name, value, MAX_ALLOWED)))
    if not ids:
        raise invalid(name, [], "at least one token id, or None to allow all")
    return ids


def _bad_words(name: str, value: object) -> tuple[str | tuple[int, ...], ...]:
    """Texts, which serving/intake.py will turn into tokens, and token sequences."""
    given = (value,) if isinstance(value, str) else items(name, value, "texts")
    if len(given) > MAX_BAD_WORDS:
        raise invalid(name, f"{len(given)} entries", f"at most {MAX_BAD_WORDS}")
    return tuple(dict.fromkeys(map(_bad_word, given)))


def _bad_word(word: object) -> str | tuple[int, ...]:
    if isinstance(word, str):
        if not word.strip() or len(word) > MAX_BAD_WORD_LENGTH:
            limit = f"texts of 1 to {MAX_BAD_WORD_LENGTH} characters, not of spaces alone"
            raise invalid("bad_words", word, limit)
        return word
    ids = _ids("bad_words", word, MAX_BAD_WORD_TOKENS)
    if not ids:
        raise invalid("bad_words", ids, f"sequences of 1 to {MAX_BAD_WORD_TOKENS} token ids")
    return ids


_MADE_PLAIN: Mapping[str, Callable[[str, object], object]] = {
    "temperature": _number,
    "top_k": _top_k,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "logit_bias": _logit_bias,
    "allowed_token_ids": _allowed,
    "bad_words": _bad_words,
    "seed": _whole_or_none,
    "max_tokens": _whole_or_none,
    "min_tokens": _whole,
    "stop": _stop_strings,
    "stop_token_ids": _stop_ids,
    "ignore_eos": _true_or_false,
    "logprobs": _whole_or_none,
    "prompt_logprobs": _whole_or_none,
    "n": _whole,
    "best_of": _whole_or_none,
    "skip_special_tokens": _true_or_false,
}
"""What checks each parameter and makes it plain; there is one for each."""

_CHECKS = [(each.name, each.default, _MADE_PLAIN[each.name]) for each in fields(SamplingParams)]
"""Name, default and check of each parameter. A default is plain; only `logit_bias` has none."""
