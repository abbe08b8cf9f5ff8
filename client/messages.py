"""Python values as messages of generation.proto. Used by both clients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from ..errors import InvalidRequest, invalid
from ..protos.v1 import generation_pb2 as pb
from .checks import TEXT, items, limit_of, set_field

Messages = Sequence[Mapping[str, Any]]
"""Of a chat, in OpenAI's form: [{"role": "user", "content": "..."}, ...]."""

Prompt = str | Sequence[int] | Messages | pb.ChatPrompt
"""Text, token ids, messages of a chat, or such with more to say (`chat`)."""

_Asks = TypeVar("_Asks", pb.GenerateRequest, pb.EmbedRequest)
_Prompted = TypeVar("_Prompted", pb.GenerateRequest, pb.EmbedInput, pb.TokenizeRequest)

_SAMPLING = tuple(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_LABELS = ("request_id", "priority", "tenant", "cache_salt")
_CHAT_MESSAGE = tuple(field.name for field in pb.ChatMessage.DESCRIPTOR.fields)
_TOKEN_IDS: Any = pb.TokenIds.DESCRIPTOR.fields_by_name["ids"]


class Labels(TypedDict, total=False):
    """What may be said of a request whatever it asks for, as in GenerateRequest."""

    request_id: str | None
    priority: int | None
    tenant: str | None
    cache_salt: str | None


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
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    skip_special_tokens: bool | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str | Sequence[int]] | None
    prompt_logprobs: int | None
    n: int | None
    best_of: int | None


def generate_request(prompt: Prompt, fields: Mapping[str, Any]) -> pb.GenerateRequest:
    """A request to generate.

    Args:
      prompt: what to continue.
      fields: as of Fields.

    Raises:
      InvalidRequest: a name is unknown, or a value is of a type that the field cannot hold; says
        which, and what it may be. What a value means is the server's to judge.
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
    prompts = items("inputs", inputs, "a list of prompts; a single one is a list of one")
    for at, prompt in enumerate(prompts):
        try:
            _prompted(request.inputs.add(), prompt)
        except InvalidRequest as error:
            raise InvalidRequest(f"inputs[{at}]: {error}") from error
    return request


def tokenize_request(
    prompt: str | Messages | pb.ChatPrompt, **how: bool | None
) -> pb.TokenizeRequest:
    """A request to tokenize; raises InvalidRequest."""
    request = _prompted(pb.TokenizeRequest(), prompt)
    for name, value in how.items():
        if value is not None:
            set_field(request, name, value)
    return request


def detokenize_request(ids: Sequence[int], skip_special_tokens: bool) -> pb.DetokenizeRequest:
    """A request to detokenize; raises InvalidRequest."""
    request = pb.DetokenizeRequest()
    _put_ids(request.token_ids, "token_ids", ids)
    set_field(request, "skip_special_tokens", skip_special_tokens)
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
      InvalidRequest: a message has a field that ChatMessage does not, or a value of a type that it
        cannot hold.
    """
    prompt = pb.ChatPrompt(
        messages=[_chat_message(where, m) for where, m in _objects("messages", messages)],
        tools=[_json(where, tool) for where, tool in _objects("tools", tools)],
        documents=[_json(where, text) for where, text in _objects("documents", documents)],
    )
    for name, value in (("add_generation_prompt", add_generation_prompt), ("template", template)):
        if value is not None:
            set_field(prompt, name, value)
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
                texts = [value] if isinstance(value, str) else value
                for where, text in _numbered(name, texts, "a text, or a list of texts"):
                    if not isinstance(text, str):
                        raise invalid(where, text, TEXT)
                    _put(where, text, TEXT, message.stop.append)
            case "stop_token_ids":
                _put_ids(message.stop_token_ids, name, value)
            case "logit_bias":
                limit = "numbers by token ids, such as {7: -1.5}"
                if not isinstance(value, Mapping):
                    raise invalid(name, value, limit)
                _put(name, value, limit, message.logit_bias.update)
            case "allowed_token_ids":
                message.allowed_token_ids.SetInParent()  # none allowed is not all allowed
                _put_ids(message.allowed_token_ids.ids, name, value)
            case "bad_words":
                limit = "a list of texts or of lists of token ids"
                for where, word in _numbered(name, value, limit):
                    _bad_word(message.bad_words.add(), where, word)
            case _:
                set_field(message, name, value)
    return message


def _labelled(request: _Asks, labels: Mapping[str, Any]) -> _Asks:
    for name in _LABELS:
        if labels.get(name) is not None:
            set_field(request, name, labels[name])
    return request


def _prompted(request: _Prompted, prompt: Any) -> _Prompted:
    if isinstance(prompt, str):
        set_field(request, "text", prompt, "prompt")
    elif isinstance(prompt, pb.ChatPrompt):
        request.chat.CopyFrom(prompt)
    else:
        ids = None if isinstance(request, pb.TokenizeRequest) else request.token_ids
        limit = f"text, {'' if ids is None else 'token ids, '}or messages of a chat"
        parts = items("prompt", prompt, limit)
        if parts and isinstance(parts[0], Mapping):
            request.chat.CopyFrom(chat(parts))
        elif ids is None:
            raise invalid("prompt", prompt, limit)
        else:
            ids.SetInParent()  # none is not unset
            _put_ids(ids.ids, "prompt", parts)
    return request


def _chat_message(where: str, given: Mapping[str, Any]) -> pb.ChatMessage:
    message = pb.ChatMessage()
    for name, value in given.items():
        if name not in _CHAT_MESSAGE:
            raise InvalidRequest(
                f"{where}.{name}: no such field; there are {', '.join(_CHAT_MESSAGE)}"
            )
        if name == "tool_calls":
            for at, call in _objects(f"{where}.{name}", value or ()):
                message.tool_calls.append(_tool_call(at, call))
        elif value is not None:
            set_field(message, name, value, f"{where}.{name}")
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
    call = pb.ToolCall()
    set_field(call, "arguments", text, f"{where}.arguments")
    set_field(call, "name", name, f"{where}.name")
    set_field(call, "id", given.get("id") or "", f"{where}.id")
    return call


def _json(field: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"{field}: got {value!r:.80}, must be JSON: {error}") from error


def _bad_word(message: pb.BadWord, where: str, word: Any) -> None:
    if isinstance(word, str):
        set_field(message, "text", word, where)
        return
    ids = items(where, word, "a text or a list of token ids")
    message.token_ids.SetInParent()
    _put_ids(message.token_ids.ids, where, ids)


def _put_ids(ids: Any, field: str, given: Any) -> None:
    """Into a repeated field of token ids."""
    limit = f"a token id, {limit_of(_TOKEN_IDS)}"
    listed = items(field, given, "a list of token ids")
    try:
        ids.extend(listed)
    except (TypeError, ValueError):
        for at, one in enumerate(listed):
            _put(f"{field}[{at}]", one, limit, ids.append)
        raise  # unreachable: one of them was not taken


def _put(field: str, given: Any, limit: str, put: Any) -> None:
    try:
        put(given)
    except (TypeError, ValueError, AttributeError) as error:
        raise invalid(field, given, limit) from error


def _numbered(field: str, given: Any, limit: str) -> list[tuple[str, Any]]:
    """What is in a list, with what to call each."""
    return [(f"{field}[{at}]", one) for at, one in enumerate(items(field, given, limit))]


def _objects(field: str, given: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """The same of a list of JSON objects."""
    found = _numbered(field, given, "a list of JSON objects")
    for where, one in found:
        if not isinstance(one, Mapping):
            raise invalid(where, one, "a JSON object")
    return found
