"""Python values as messages of generation.proto. Used by both clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from ..errors import InvalidRequest
from ..protos.v1 import generation_pb2 as pb

Prompt = str | Sequence[int]
"""Text, or token ids."""

_SAMPLING = tuple(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_LABELS = ("request_id", "priority", "tenant", "cache_salt")


class Fields(TypedDict, total=False):
    """What may be said of a request besides its prompt: labels as in GenerateRequest, the rest as
    in SamplingParams, where it says what each may be. Left out, or None, is the model's default.
    """

    request_id: str
    priority: int
    tenant: str
    cache_salt: str
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool | None
    logprobs: int | None
    skip_special_tokens: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str | Sequence[int]]
    prompt_logprobs: int | None
    n: int | None
    best_of: int | None


def generate_request(prompt: Prompt, fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """A request to generate.

    Args:
      prompt: what to continue.
      fields: as of Fields.

    Raises:
      InvalidRequest: a name is unknown, or a value is of a type that the field cannot hold. What a
        value may be is the server's to say.
    """
    sampling = {name: value for name, value in fields.items() if name not in _LABELS}
    request = pb.GenerateRequest(sampling=sampling_params(sampling))
    for name in _LABELS:
        if fields.get(name) is not None:
            _set(request, name, fields[name])
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    else:
        request.token_ids.CopyFrom(token_ids("prompt", prompt))
    return request


def sampling_params(given: Mapping[str, Any]) -> pb.SamplingParams:
    """The same names, as a message."""
    message = pb.SamplingParams()
    for name, value in given.items():
        if name not in _SAMPLING:
            raise InvalidRequest(
                f"{name}: no such field; there are {', '.join((*_LABELS, *_SAMPLING))}"
            )
        if value is None:
            continue
        match name:
            case "stop":
                texts = [value] if isinstance(value, str) else list(value)
                _fill(name, value, message.stop.extend, texts)
            case "stop_token_ids":
                _fill(name, value, message.stop_token_ids.extend, list(value))
            case "logit_bias":
                _fill(name, value, message.logit_bias.update, value)
            case "allowed_token_ids":
                message.allowed_token_ids.CopyFrom(token_ids(name, value))
            case "bad_words":
                message.bad_words.extend(_bad_word(word) for word in value)
            case _:
                _set(message, name, value)
    return message


def token_ids(field: str, ids: Iterable[int]) -> pb.TokenIds:
    """Raises InvalidRequest for what is no token id."""
    message = pb.TokenIds()
    _fill(field, ids, message.ids.extend, ids)
    return message


def _bad_word(word: str | Sequence[int]) -> pb.BadWord:
    if isinstance(word, str):
        message = pb.BadWord()
        _set(message, "text", word, "bad_words")
        return message
    return pb.BadWord(token_ids=token_ids("bad_words", word))


def _set(message: Any, name: str, value: Any, field: str = "") -> None:
    _fill(field or name, value, lambda checked: setattr(message, name, checked), value)


def _fill(field: str, given: Any, put: Any, value: Any) -> None:
    try:
        put(value)
    except (TypeError, ValueError, AttributeError) as error:
        shown = repr(given)
        shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
        raise InvalidRequest(
            f"{field}: got {shown}, which the message cannot hold: {error}"
        ) from error
