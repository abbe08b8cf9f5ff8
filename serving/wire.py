"""Between the wire (protos/v1/generation.proto) and the engine's own types. Pure conversion.

A new field of the proto is read or written here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InvalidRequest
from ..protos.v1 import generation_pb2 as pb
from ..sched.sampling_params import SamplingParams
from .answer import Chunk, Completion, PositionLogprobs
from .auth.caller import tenant_for
from .intake import Labels, Prompt

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

_FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}


def prompt_of(request: pb.GenerateRequest) -> Prompt:
    """The prompt in whichever form it came."""
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "token_ids":
            return list(request.token_ids.ids)
        case _:
            raise InvalidRequest("prompt: got none, must be text or token_ids")


def sampling_of(request: pb.GenerateRequest) -> dict[str, Any]:
    """The sampling parameters the request sets; what it leaves unset is the model's own default."""
    given = request.sampling
    chosen: dict[str, Any] = {
        name: getattr(given, name) for name in _SCALARS if given.HasField(name)
    }
    if given.stop:
        chosen["stop"] = tuple(given.stop)
    if given.stop_token_ids:
        chosen["stop_token_ids"] = tuple(given.stop_token_ids)
    if given.logit_bias:
        chosen["logit_bias"] = dict(given.logit_bias)
    if given.HasField("allowed_token_ids"):
        chosen["allowed_token_ids"] = tuple(given.allowed_token_ids.ids)
    if given.bad_words:
        chosen["bad_words"] = tuple(_bad_word(word) for word in given.bad_words)
    return chosen


def _bad_word(word: pb.BadWord) -> str | tuple[int, ...]:
    if word.WhichOneof("word") == "token_ids":
        return tuple(word.token_ids.ids)
    return word.text


def labels_of(request: pb.GenerateRequest, deadline: float | None) -> Labels:
    """Everything else the request says; its tenant is the API key's, where there are keys."""
    return Labels(
        name=request.request_id,
        priority=request.priority,
        tenant=tenant_for(request.tenant),
        cache_salt=request.cache_salt,
        deadline=deadline,
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
      usage: on the last message, else None.
    """
    return pb.GenerateChunk(
        request_id=request_id,
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=_logprobs(chunk.logprobs, chunk.token_ids, sampling.logprobs),
        finish_reason=_FINISH[chunk.finish_reason],
        stop_reason=_stop_reason(chunk.stop_reason),
        usage=usage,
        index=chunk.index,
        prompt_logprobs=_logprobs(chunk.prompt_logprobs, prompt, sampling.prompt_logprobs),
    )


def response_message(
    completions: Sequence[Completion],
    sampling: SamplingParams,
    *,
    prompt: tuple[int, ...],
    prompt_logprobs: Sequence[PositionLogprobs | None] | None,
    request_id: str,
    usage: pb.Usage,
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
    )


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
