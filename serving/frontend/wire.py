"""Between the wire (protos/v1/generation.proto) and the engine's own types. Pure conversion.

A new field of the proto is read or written here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ...errors import InvalidRequest, invalid
from ...model.plan import MAX_BAD_WORD_TOKENS
from ...protos.v1 import generation_pb2 as pb
from ...sched.request import Request, RequestOutput, Timing
from ...sched.sampling_params import LIMITS, SamplingParams
from ..answer import Chunk, Completion, PositionLogprobs
from ..auth.caller import tenant_for
from ..intake import Chat, Labels, Prompt

_SCALARS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "skip_special_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "prompt_logprobs",
    "n",
    "best_of",
)

_LISTS = ("stop", "stop_token_ids")

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}


PROXY_NUMBERS = range(1000, 2000)
"""Of fields that are others' to read; reserved in the .proto."""


def check_known(message: Message, where: str = "") -> None:
    """Raises InvalidRequest for a field that this server does not know: of a newer API, perhaps,
    and dropping it would change what the caller gets."""
    for unknown in UnknownFieldSet(message):  # type: ignore[attr-defined]  # stubs know it not
        if unknown.field_number not in PROXY_NUMBERS:
            raise InvalidRequest(
                f"{where}field {unknown.field_number}: got a value, must be unset: this server "
                "does not know it, and may be older than its caller"
            )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in (value,) if isinstance(value, Message) else value:
            check_known(part, f"{where}{field.name}.")


def prompt_of(message: pb.GenerateRequest | pb.TokenizeRequest | pb.EmbedInput) -> Prompt | Chat:
    """The prompt in whichever form it came."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "chat":
            return _chat(message.chat)
        case "token_ids" if not isinstance(message, pb.TokenizeRequest):
            return message.token_ids.ids  # not a list, before its length was looked at
        case _:
            forms = message.DESCRIPTOR.oneofs_by_name["prompt"].fields
            *others, last = (field.name for field in forms)
            limit = f"{', '.join(others)} or {last}"
            raise InvalidRequest(f"prompt: got none, must be {limit}")


_CHAT_FIELDS = ("messages", "tools", "documents", "add_generation_prompt", "template", "self")
"""Names that `template_args` may not have: those of the template's other arguments."""


def _chat(chat: pb.ChatPrompt) -> Chat:
    if not chat.messages:
        raise InvalidRequest("chat.messages: got none, must be at least 1")
    args = _json_object("chat.template_args", chat.template_args or "{}")
    for name in _CHAT_FIELDS:
        if name in args:
            limit = f"an object without {', '.join(_CHAT_FIELDS)}"
            raise invalid("chat.template_args", f"one with {name!r}", limit)
    if chat.HasField("add_generation_prompt"):
        args["add_generation_prompt"] = chat.add_generation_prompt
    if chat.HasField("template"):
        args["template"] = chat.template
    for name in ("tools", "documents"):
        texts = getattr(chat, name)
        if texts:
            args[name] = [_json_object(f"chat.{name}[{i}]", t) for i, t in enumerate(texts)]
    messages = [_chat_message(f"chat.messages[{i}]", m) for i, m in enumerate(chat.messages)]
    return Chat(messages, args)


def _chat_message(where: str, message: pb.ChatMessage) -> dict[str, Any]:
    """As templates read it: what is unset is absent, but the content, which is then null."""
    if not message.role:
        raise invalid(f"{where}.role", "", 'a role, such as "user"')
    given: dict[str, Any] = {"role": message.role, "content": None}
    for name in ("content", "name", "tool_call_id", "reasoning_content"):
        if message.HasField(name):
            given[name] = getattr(message, name)
    if message.tool_calls:
        given["tool_calls"] = [
            _tool_call(f"{where}.tool_calls[{i}]", call)
            for i, call in enumerate(message.tool_calls)
        ]
    return given


def _tool_call(where: str, call: pb.ToolCall) -> dict[str, Any]:
    if not call.name:
        raise invalid(f"{where}.name", "", "the name of a function")
    arguments = _json_object(f"{where}.arguments", call.arguments or "{}")
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _json_object(where: str, text: str) -> dict[str, Any]:
    """The object that a text of JSON spells."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(where, text, f"a JSON object ({error})") from None
    if not isinstance(value, dict):
        raise invalid(where, text, "a JSON object")
    return value


def sampling_of(request: pb.GenerateRequest) -> dict[str, Any]:
    """The sampling parameters the request sets; what it leaves unset is the model's own default."""
    given = request.sampling
    chosen: dict[str, Any] = {
        name: getattr(given, name) for name in _SCALARS if given.HasField(name)
    }
    for name in _LISTS:
        if values := getattr(given, name):
            chosen[name] = tuple(_bounded(name, values))
    if given.logit_bias:
        chosen["logit_bias"] = dict(_bounded("logit_bias", given.logit_bias))
    if given.HasField("allowed_token_ids"):
        ids = given.allowed_token_ids.ids
        chosen["allowed_token_ids"] = tuple(_bounded("allowed_token_ids", ids))
    if given.bad_words:
        words = _bounded("bad_words", given.bad_words)
        chosen["bad_words"] = tuple(_bad_word(word) for word in words)
    return chosen


def _bounded(name: str, values: Collection[Any]) -> Any:
    """The values of a parameter, which are as many as it may have: counted before they are copied.

    Raises:
      InvalidRequest: they are more.
    """
    most = LIMITS[name].entries
    if most is not None and len(values) > most:
        raise invalid(name, f"{len(values)} entries", f"at most {most}")
    return values


def sampling_message(sampling: SamplingParams) -> pb.SamplingParams:
    """Sampling parameters as a request would set them; those that are None stay unset."""
    scalars = {name: getattr(sampling, name) for name in _SCALARS}
    allowed = sampling.allowed_token_ids
    words = [
        pb.BadWord(text=word)
        if isinstance(word, str)
        else pb.BadWord(token_ids=pb.TokenIds(ids=word))
        for word in sampling.bad_words
    ]
    return pb.SamplingParams(
        stop=sampling.stop,
        stop_token_ids=sampling.stop_token_ids,
        logit_bias=sampling.logit_bias,
        allowed_token_ids=None if allowed is None else pb.TokenIds(ids=allowed),
        bad_words=words,
        **scalars,
    )


def _bad_word(word: pb.BadWord) -> str | tuple[int, ...]:
    if word.WhichOneof("word") == "token_ids":
        ids = word.token_ids.ids
        if len(ids) > MAX_BAD_WORD_TOKENS:
            raise invalid("bad_words", f"{len(ids)} ids", f"at most {MAX_BAD_WORD_TOKENS}")
        return tuple(ids)
    return word.text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def labels_of(
    request: pb.GenerateRequest | pb.EmbedRequest,
    deadline: float | None,
    traceparent: str = "",
    tracestate: str = "",
) -> Labels:
    """Everything else the request says, and its call's metadata; its tenant is the API key's, where
    there are keys."""
    return Labels(
        name=request.request_id,
        priority=request.priority,
        tenant=tenant_for(request.tenant),
        cache_salt=request.cache_salt,
        deadline=deadline,
        traceparent=traceparent,
        tracestate=tracestate,
    )


def chunk_message(
    chunk: Chunk,
    sampling: SamplingParams,
    *,
    prompt: tuple[int, ...],
    request_id: str,
    usage: pb.Usage | None,
) -> pb.GenerateChunk:
    """One message of a stream.

    Args:
      chunk: what it says.
      sampling: of the request.
      prompt: of the request.
      request_id: on the first message, else empty.
      usage: on the last message, which has a finish_reason, else None.
    """
    # Nearly all messages are this and no more, and a field that is set to nothing costs as much.
    message = pb.GenerateChunk(text=chunk.text, token_ids=chunk.token_ids)
    if request_id:
        message.request_id = request_id
    if chunk.index:
        message.index = chunk.index
    if chunk.logprobs is not None:
        message.logprobs.extend(_logprobs(chunk.logprobs, chunk.token_ids, sampling.logprobs))
    if chunk.prompt_logprobs is not None:
        scores = _logprobs(chunk.prompt_logprobs, prompt, sampling.prompt_logprobs)
        message.prompt_logprobs.extend(scores)
    if chunk.finish_reason is not None:
        end = pb.GenerateChunk(
            finish_reason=_FINISH[chunk.finish_reason],
            stop_reason=_stop_reason(chunk.stop_reason),
            usage=usage,
            timing=_timing(chunk.timing),
        )
        message.MergeFrom(end)
    return message


def response_message(
    completions: Sequence[Completion],
    sampling: SamplingParams,
    *,
    prompt: tuple[int, ...],
    prompt_logprobs: Sequence[PositionLogprobs | None] | None,
    request_id: str,
    usage: pb.Usage,
    timing: Timing | None = None,
) -> pb.GenerateResponse:
    """The whole answers in one message; arguments as of `chunk_message`."""
    choices = [_choice(completion, sampling.logprobs) for completion in completions]
    first = choices[0]
    return pb.GenerateResponse(
        request_id=request_id,
        text=first.text,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        finish_reason=first.finish_reason,
        stop_reason=first.stop_reason if first.HasField("stop_reason") else None,
        usage=usage,
        choices=choices if len(choices) > 1 else (),
        prompt_logprobs=_logprobs(prompt_logprobs, prompt, sampling.prompt_logprobs),
        cumulative_logprob=completions[0].cumulative_logprob,
        timing=_timing(timing),
    )


def embed_message(
    request_id: str, requests: Sequence[Request], outputs: Sequence[RequestOutput]
) -> pb.EmbedResponse:
    """The embeddings of a call's inputs, in order."""
    embeddings = [
        pb.Embedding(
            values=output.pooled,
            prompt_tokens=len(request.prompt),
            cached_tokens=output.cached_tokens,
        )
        for request, output in zip(requests, outputs, strict=True)
    ]
    usage = pb.Usage(
        prompt_tokens=sum(entry.prompt_tokens for entry in embeddings),
        cached_tokens=sum(entry.cached_tokens for entry in embeddings),
    )
    return pb.EmbedResponse(request_id=request_id, embeddings=embeddings, usage=usage)


def _timing(timing: Timing | None) -> pb.Timing | None:
    return None if timing is None else pb.Timing(**asdict(timing))


def _choice(completion: Completion, alternatives: int | None) -> pb.Choice:
    return pb.Choice(
        index=completion.index,
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=_logprobs(completion.logprobs, completion.token_ids, alternatives),
        finish_reason=_FINISH[completion.finish_reason],
        stop_reason=_stop_reason(completion.stop_reason),
        cumulative_logprob=completion.cumulative_logprob,
    )


def _stop_reason(reason: str | int | None) -> pb.StopReason | None:
    if reason is None:
        return None
    if isinstance(reason, str):
        return pb.StopReason(stop=reason)
    return pb.StopReason(stop_token_id=reason)


def _logprobs(
    positions: Sequence[PositionLogprobs | None] | None,
    tokens: Sequence[int],
    alternatives: int | None,
) -> list[pb.PositionLogprobs]:
    if positions is None:
        return []
    return [
        pb.PositionLogprobs() if at is None else _position(at, token, alternatives or 0)
        for at, token in zip(positions, tokens, strict=True)
    ]


def _position(at: PositionLogprobs, chosen: int, alternatives: int) -> pb.PositionLogprobs:
    messages = {
        token: pb.TokenLogprob(
            token_id=token, token=entry.decoded_token, logprob=entry.logprob, rank=entry.rank
        )
        for token, entry in at.items()
    }
    # The chosen token stands last in `at` where it is not one of the alternatives.
    return pb.PositionLogprobs(chosen=messages[chosen], top=list(messages.values())[:alternatives])
