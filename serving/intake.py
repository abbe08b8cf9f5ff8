"""From what callers send to what the engine takes: tokenizing, defaults, limits, request ids.

Both faces (serving/llm.py and the gRPC service) make their requests here, so a prompt means the
same through each. Everything that can be wrong with a request is found here, before any of a call's
requests is submitted.
"""

from __future__ import annotations

import functools
import operator
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from ..checkpoints.folder import Checkpoint
from ..errors import CheckpointError, InvalidRequest, invalid
from ..model.plan import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_STOP_IDS, RunnerSpec
from ..sched.limits import check_prompt_length, check_request, context_limit, longest_prompt
from ..sched.request import POOLED_SAMPLING, Request, SamplingParams
from .answer import Answer
from .choices import Choices

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": [...]}."""

Messages = Sequence[Mapping[str, Any]]
"""Chat messages: [{"role": "user", "content": "..."}, ...]."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt of chat messages, and what else the chat template is to get (its `render`)."""

    messages: Messages
    template_args: Mapping[str, Any]


MAX_NAME_LENGTH = 256

MAX_TEXT_TOKENS = 131_072
"""Of a text that is only tokenized, or detokenized; as many as the context has, where that is more.
"""

_NO_TOKENIZER = "this checkpoint has no tokenizer.json"


@dataclass(frozen=True, slots=True)
class Labels:
    """What a caller may say of a request besides prompt and sampling."""

    name: str = ""  # the caller's own id; in messages and logs
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline: float | None = None  # time.monotonic() seconds
    traceparent: str = ""  # W3C Trace Context
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """What the engine's process alone knows of its model, for who asks.

    Attributes:
      name: as the server was told: a folder, or a name on the hub.
      dtype: of weights, activations and KV.
    """

    name: str = ""
    dtype: str = ""


class Intake:
    """Makes requests for one model.

    Args:
      checkpoint: gives the tokenizer, the chat template and the model's own defaults.
      spec: the engine's limits.
      served: not needed to make requests.

    Attributes:
      max_text_tokens: that `encode` gives, and `decode` takes.

    Raises:
      CheckpointError: there is a tokenizer, but it cannot be read; or the model's end-of-sequence
        ids cannot be served, for which no request is to blame.
    """

    def __init__(self, checkpoint: Checkpoint, spec: RunnerSpec, served: Served = Served()):
        self._checkpoint = checkpoint
        self.served = served
        self._spec = spec
        # Read now, not at the first request: it takes a second, and may be broken.
        self._tokenizer = checkpoint.tokenizer if checkpoint.has_tokenizer else None
        self._eos_ids = _eos_ids(checkpoint, spec)
        self._longest = longest_prompt(spec, pooled=True)
        self.max_text_tokens = max(MAX_TEXT_TOKENS, context_limit(spec)[0])
        # Log-probabilities ask for up to 21 of them at each position.
        self._token_text = functools.cache(self._text_of_token)

    def default_sampling(self, prompt_tokens: int = 1, **chosen: Any) -> SamplingParams:
        """The model's own defaults (generation_config.json; greedy if it says nothing), overridden
        by what the caller chose.

        Args:
          prompt_tokens: of the prompt it is for. The model's own `max_tokens` gives way where the
            context has less room; one that the caller chose does not.
          chosen: any fields of SamplingParams.
        """
        model = self._checkpoint.generation
        own: dict[str, Any] = {"temperature": 0.0, "max_tokens": model.max_new_tokens}
        if model.max_new_tokens is not None:
            room = max(context_limit(self._spec)[0] - prompt_tokens, 1)
            least = chosen.get("min_tokens")
            wanted = max(model.max_new_tokens, int(least) if isinstance(least, Integral) else 0)
            own["max_tokens"] = min(wanted, room)
        if model.repetition_penalty is not None:
            own["repetition_penalty"] = model.repetition_penalty
        if model.do_sample:  # transformers, too, ignores the rest unless this is set
            names = ("temperature", "top_k", "top_p", "min_p")
            own |= {n: getattr(model, n) for n in names if getattr(model, n) is not None}
            own["temperature"] = 1.0 if model.temperature is None else model.temperature
        return SamplingParams(**{**own, **chosen})

    def tokens_of(self, prompt: Prompt | Chat, *, pooled: bool = False) -> tuple[int, ...]:
        """Token ids of a prompt in any form; text gets the tokenizer's special tokens.

        One that is much too long is refused before all of it was looked at, as being for an
        embedding (`pooled`) or for an answer.

        Raises:
          InvalidRequest: of another form, empty, or much too long.
        """
        if isinstance(prompt, Chat):
            return self.chat_tokens(prompt.messages, **prompt.template_args)
        if isinstance(prompt, Mapping):
            prompt = _unwrapped(prompt)
        if isinstance(prompt, str):
            self._refuse_longer("prompt", prompt, longest_prompt(self._spec, pooled=pooled))
            tokens = self._encode("prompt", prompt)
        else:
            if isinstance(prompt, Sequence) and len(prompt) > self._longest:
                check_prompt_length(len(prompt), self._spec, pooled=pooled)
            tokens = _ids(prompt)
        if not tokens:
            raise InvalidRequest("prompt: got no tokens, must have at least 1")
        return tuple(tokens)

    def chat_tokens(self, messages: Messages, **template_args: Any) -> tuple[int, ...]:
        """Token ids of chat messages, by the model's chat template, ready for an answer."""
        _check_messages(messages)
        text = self._checkpoint.chat_template.render(messages, **template_args)
        self._refuse_longer("messages", text, self._longest)
        # The template writes its own special tokens.
        return tuple(self._encode("messages", text, add_special_tokens=False))

    def request(
        self, prompt: tuple[int, ...], sampling: SamplingParams, labels: Labels = Labels()
    ) -> Request:
        """A request that the engine can serve; draws what the caller left open (id, seed).

        Raises:
          InvalidRequest: it can never be served as asked.
        """
        check_labels(labels)
        if sampling.stop and self._tokenizer is None:
            raise invalid("stop", list(sampling.stop), f"empty: {_NO_TOKENIZER}")
        return self._checked(prompt, _seeded(self._with_bad_words_as_ids(sampling)), labels)

    def embedding(self, prompt: tuple[int, ...], labels: Labels = Labels()) -> Request:
        """A request for a prompt's embedding (serving/vectors.py follows it); raises likewise."""
        check_labels(labels)
        return self._checked(prompt, POOLED_SAMPLING, labels, pooled=True)

    def _checked(
        self,
        prompt: tuple[int, ...],
        sampling: SamplingParams,
        labels: Labels,
        *,
        pooled: bool = False,
    ) -> Request:
        request = Request(
            id=_drawn_id(labels.name),
            prompt=prompt,
            sampling=sampling,
            eos_ids=self._eos_ids,
            priority=labels.priority,
            tenant=labels.tenant,
            deadline=labels.deadline,
            cache_salt=labels.cache_salt,
            pooled=pooled,
            traceparent=labels.traceparent,
            tracestate=labels.tracestate,
        )
        check_request(request, self._spec)
        return request

    def choices(self, sampling: SamplingParams) -> Choices:
        """What will follow the request's outputs. Without a tokenizer, its answers have no text."""

        def answer() -> Answer:
            decoder = None
            if self._tokenizer is not None:
                skip = sampling.skip_special_tokens
                decoder = self._tokenizer.stream_decoder(skip_special_tokens=skip)
            return Answer(sampling, decoder, self._token_text)

        return Choices(sampling, answer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text, which may have none.

        Raises:
          InvalidRequest: there is no tokenizer, or they are more than `max_text_tokens`.
        """
        most = self.max_text_tokens
        self._refuse_longer("text", text, most)
        tokens = self._encode("text", text, add_special_tokens=add_special_tokens)
        if len(tokens) > most:
            raise InvalidRequest(f"text: got {len(tokens)} tokens, must be at most {most}")
        return tuple(tokens)

    def spellings(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it; empty for ids without a token."""
        if self._tokenizer is None:
            raise InvalidRequest(f"return_tokens: cannot be served: {_NO_TOKENIZER}")
        return [self._tokenizer.id_to_token(token) or "" for token in tokens]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids.

        Raises:
          InvalidRequest: one is none of the model's, they are more than `max_text_tokens`, or there
            is no tokenizer.
        """
        if self._tokenizer is None:
            raise InvalidRequest(f"token_ids: cannot be made text: {_NO_TOKENIZER}")
        if len(tokens) > (most := self.max_text_tokens):
            raise InvalidRequest(f"token_ids: got {len(tokens)} ids, must be at most {most}")
        vocabulary = self._spec.vocab_size
        for at, token in enumerate(tokens):
            if not 0 <= token < vocabulary:
                limit = f"a whole number from 0 to {vocabulary - 1} (the vocabulary)"
                raise invalid(f"token_ids[{at}]", token, limit)
        return self.text_of(tokens, skip_special_tokens=skip_special_tokens)

    def text_of(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole answer; empty without a tokenizer."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    @property
    def checkpoint(self) -> Checkpoint:
        return self._checkpoint

    @property
    def spec(self) -> RunnerSpec:
        return self._spec

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The model's end-of-sequence ids."""
        return self._eos_ids

    def _with_bad_words_as_ids(self, sampling: SamplingParams) -> SamplingParams:
        """Texts become tokens, as they are written within a word and at its beginning."""
        sequences: dict[tuple[int, ...], None] = {}  # each once, in order
        for word in sampling.bad_words:
            if not isinstance(word, str):
                sequences[word] = None
                continue
            bare = word.lstrip()
            for text in (bare, f" {bare}"):
                ids = tuple(self._encode("bad_words", text, add_special_tokens=False))
                if not 0 < len(ids) <= MAX_BAD_WORD_TOKENS:
                    shown = f"{word!r} ({len(ids)} tokens)"
                    limit = f"texts of 1 to {MAX_BAD_WORD_TOKENS} tokens"
                    raise InvalidRequest(f"bad_words: got {shown}, must be {limit}")
                sequences[ids] = None
        if len(sequences) > MAX_BAD_WORDS:
            raise InvalidRequest(
                f"bad_words: got {len(sequences)} token sequences, must be at most {MAX_BAD_WORDS} "
                "(a text is two: with and without a space before it)"
            )
        return replace(sampling, bad_words=tuple(sequences)) if sequences else sampling

    def _text_of_token(self, token: int) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def _refuse_longer(self, field: str, text: str, most: int) -> None:
        """Raises InvalidRequest for a text that has more tokens for sure."""
        if self._tokenizer is not None and self._tokenizer.exceeds(text, most, field=field):
            size = f"more than {most} tokens ({len(text)} characters)"
            raise InvalidRequest(f"{field}: got {size}, must be at most {most}")

    def _encode(self, field: str, text: str, **how: Any) -> list[int]:
        if self._tokenizer is None:
            raise no_tokenizer(field)
        return self._tokenizer.encode(text, field=field, **how)


def no_tokenizer(field: str) -> InvalidRequest:
    """What is said to who sends text to a checkpoint without a tokenizer."""
    return InvalidRequest(f"{field}: got text, must be token ids: {_NO_TOKENIZER}")


def _eos_ids(checkpoint: Checkpoint, spec: RunnerSpec) -> tuple[int, ...]:
    """The model's end-of-sequence ids, which the device must have room for."""
    ids = checkpoint.eos_ids
    source = f"{checkpoint.folder / 'generation_config.json'} (or config.json, or the tokenizer)"
    if len(ids) > MAX_STOP_IDS:
        raise CheckpointError(
            f"{source}: eos_token_id: got {len(ids)} ids, must be at most {MAX_STOP_IDS}"
        )
    for token in ids:
        if token >= spec.vocab_size:
            raise CheckpointError(
                f"{source}: eos_token_id: got {token}, must be whole numbers from 0 to "
                f"{spec.vocab_size - 1} (the vocabulary)"
            )
    return ids


def _unwrapped(prompt: Mapping[str, Any]) -> str | Sequence[int]:
    """The prompt within a dict of one entry."""
    match dict(prompt):
        case {"prompt": str(text), **rest} if not rest:
            return text
        case {"prompt_token_ids": ids, **rest} if not rest and not isinstance(ids, str):
            return ids
    shown = {key: type(value).__name__ for key, value in prompt.items()}
    raise invalid("prompt", shown, 'a dict of "prompt": text or "prompt_token_ids": a list')


def _ids(prompt: object) -> list[int]:
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise invalid("prompt", type(prompt).__name__, "text or a list of token ids")
    ids = list(prompt)  # once: to go over a message's field takes several times as long
    if set(map(type, ids)) <= {int}:
        return ids
    for at, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise invalid(f"prompt[{at}]", token, "a token id (a whole number)")
    return list(map(operator.index, prompt))  # such as numpy's


def _check_messages(messages: object) -> None:
    limit = 'objects with a "role", such as {"role": "user", "content": "Hello"}'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise invalid("messages", type(messages).__name__, f"a list of {limit}")
    if not messages:
        raise InvalidRequest("messages: got none, must be at least 1")
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise invalid(f"messages[{at}]", message, limit)


def check_labels(labels: Labels) -> None:
    """Raises InvalidRequest for one that is too long."""
    for field in ("name", "tenant", "cache_salt"):
        value = getattr(labels, field)
        if len(value) > MAX_NAME_LENGTH:
            # Callers know the name as request_id.
            field = "request_id" if field == "name" else field
            limit = f"at most {MAX_NAME_LENGTH} characters"
            raise invalid(field, f"{len(value)} characters", limit)


def _drawn_id(name: str) -> str:
    """Unique whatever callers call their requests: a name may be used again while the engine still
    puts away the request that had it before."""
    drawn = secrets.token_hex(8)
    return f"{name}/{drawn}" if name else drawn


def name_in(request_id: str) -> str:
    """The name that the caller of a request gave it, empty for none."""
    return request_id.rpartition("/")[0]


def _seeded(sampling: SamplingParams) -> SamplingParams:
    if sampling.seed is not None:
        return sampling
    return sampling.with_seed(secrets.randbits(63))
