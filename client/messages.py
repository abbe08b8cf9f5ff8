"""Python values as messages of generation.proto. Used by both clients."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

from ..errors import InvalidRequest
from ..protos.v1 import generation_pb2 as pb

Messages = Sequence[Mapping[str, Any]]
"""Of a chat, in OpenAI's form: [{"role": "user", "content": "..."}, ...]."""

Prompt = str | Sequence[int] | Messages | pb.ChatPrompt
"""Text, token ids, messages of a chat, or such with more to say (`chat`)."""

_Asks = TypeVar("_Asks", pb.GenerateRequest, pb.EmbedRequest)
_Prompted = TypeVar("_Prompted", pb.GenerateRequest, pb.EmbedInput, pb.TokenizeRequest)

_SAMPLING = tuple(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_LABELS = ("request_id", "priority", "tenant", "cache_salt")


class Labels(TypedDict, total=False):
    """What may be said of a request whatever it asks for, as in GenerateRequest."""

    request_id: str
    priority: int | None
    tenant: str
    cache_salt: str


class Fields(Labels, total=False):
    """What may be said of a request besides its prompt: labels, and the fields of SamplingParams,
    where it says what each may be. Left out, or None, is the model's default.
    """

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
    return _prompted(_labelled(request, fields), prompt)


def embed_request(inputs: Sequence[Prompt], labels: Mapping[str, Any]) -> pb.EmbedRequest:
    """A request to embed; raises InvalidRequest."""
    for name in labels:
        if name not in _LABELS:
            raise InvalidRequest(f"{name}: no such field; there are {', '.join(_LABELS)}")
    request = _labelled(pb.EmbedRequest(), labels)
    request.inputs.extend(_prompted(pb.EmbedInput(), prompt) for prompt in inputs)
    return request


def tokenize_request(
    prompt: str | Messages | pb.ChatPrompt, **how: bool | None
) -> pb.TokenizeRequest:
    """A request to tokenize; raises InvalidRequest."""
    request = _prompted(pb.TokenizeRequest(), prompt)
    for name, value in how.items():
        if value is not None:
            _set(request, name, value)
    return request


def chat(
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    documents: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool | None = None,
    template: str | None = None,
    **template_args: Any,
) -> pb.ChatPrompt:
    """A prompt of chat messages, written out by the model's chat template.

    Args:
      messages, tools, documents: in OpenAI's form.
      add_generation_prompt, template: as in ChatPrompt.
      template_args: whatever else the template reads, such as enable_thinking=True.

    Raises:
      InvalidRequest: a message has a field that ChatPrompt does not.
    """
    prompt = pb.ChatPrompt(
        messages=[_chat_message(f"messages[{i}]", m) for i, m in enumerate(messages)],
        tools=[_json(f"tools[{i}]", tool) for i, tool in enumerate(tools)],
        documents=[_json(f"documents[{i}]", text) for i, text in enumerate(documents)],
    )
    for name, value in (("add_generation_prompt", add_generation_prompt), ("template", template)):
        if value is not None:
            _set(prompt, name, value)
    if template_args:
        prompt.template_args = _json("template_args", template_args)
    return prompt


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


def _labelled(request: _Asks, labels: Mapping[str, Any]) -> _Asks:
    for name in _LABELS:
        if labels.get(name) is not None:
            _set(request, name, labels[name])
    return request


def _prompted(request: _Prompted, prompt: Prompt) -> _Prompted:
    if isinstance(prompt, str):
        _set(request, "text", prompt, "prompt")
    elif isinstance(prompt, pb.ChatPrompt):
        request.chat.CopyFrom(prompt)
    elif prompt and isinstance(prompt[0], Mapping):
        request.chat.CopyFrom(chat(cast(Messages, prompt)))
    elif isinstance(request, pb.TokenizeRequest):
        raise InvalidRequest(f"prompt: got {prompt!r:.80}, must be text or messages")
    else:
        request.token_ids.CopyFrom(token_ids("prompt", cast(Sequence[int], prompt)))
    return request


def _chat_message(where: str, given: Mapping[str, Any]) -> pb.ChatMessage:
    message = pb.ChatMessage()
    for name, value in given.items():
        if name == "tool_calls":
            calls = enumerate(value or ())
            message.tool_calls.extend(_tool_call(f"{where}.tool_calls[{i}]", c) for i, c in calls)
        elif value is not None:
            _set(message, name, value, f"{where}.{name}")
    return message


def _tool_call(where: str, given: Mapping[str, Any]) -> pb.ToolCall:
    """Arguments may be an object, or its JSON as OpenAI's API has it."""
    try:
        function = given["function"]
        name, arguments = function["name"], function["arguments"]
    except (TypeError, LookupError) as error:
        raise InvalidRequest(
            f'{where}: got {given!r:.80}, must be like {{"function": {{"name": "...", '
            f'"arguments": {{...}}}}}}'
        ) from error
    text = arguments if isinstance(arguments, str) else _json(f"{where}.arguments", arguments)
    call = pb.ToolCall(arguments=text)
    _set(call, "name", name, f"{where}.name")
    _set(call, "id", given.get("id") or "", f"{where}.id")
    return call


def _json(field: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field}: got {value!r:.80}, must be JSON: {error}") from error


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
