"""Between the wire (protos/v1/generation.proto) and the engine's own types. Pure conversion.

A new field of the proto is read or written here and nowhere else.
"""

from __future__ import annotations

from typing import Any

from ..errors import InvalidRequest
from ..protos.v1 import generation_pb2 as pb
from .answer import Chunk, Completion, PositionLogprobs
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
    return chosen


def labels_of(request: pb.GenerateRequest, deadline: float | None) -> Labels:
    """Everything else the request says."""
    return Labels(
        name=request.request_id,
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        deadline=deadline,
    )


def chunk_message(
    chunk: Chunk, *, alternatives: int, request_id: str, usage: pb.Usage | None
) -> pb.GenerateChunk:
    """One message of a stream.

    Args:
      chunk: what it says.
      alternatives: how many log-probabilities the caller asked for beside the chosen token's.
      request_id: on the first message, else empty.
      usage: on the last message, else None.
    """
    return pb.GenerateChunk(
        request_id=request_id,
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=_logprobs(chunk.logprobs, chunk.token_ids, alternatives),
        finish_reason=_FINISH[chunk.finish_reason],
        stop_reason=_stop_reason(chunk.stop_reason),
        usage=usage,
    )


def response_message(
    completion: Completion, *, alternatives: int, request_id: str, usage: pb.Usage
) -> pb.GenerateResponse:
    """The whole answer in one message; arguments as of `chunk_message`."""
    return pb.GenerateResponse(
        request_id=request_id,
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=_logprobs(completion.logprobs, completion.token_ids, alternatives),
        finish_reason=_FINISH[completion.finish_reason],
        stop_reason=_stop_reason(completion.stop_reason),
        usage=usage,
    )


def _stop_reason(reason: str | int | None) -> pb.StopReason | None:
    if reason is None:
        return None
    if isinstance(reason, str):
        return pb.StopReason(stop=reason)
    return pb.StopReason(stop_token_id=reason)


def _logprobs(
    positions: list[PositionLogprobs] | None, tokens: list[int], alternatives: int
) -> list[pb.PositionLogprobs]:
    if positions is None:
        return []
    return [_position(at, t, alternatives) for at, t in zip(positions, tokens, strict=True)]


def _position(at: PositionLogprobs, chosen: int, alternatives: int) -> pb.PositionLogprobs:
    messages = {
        token: pb.TokenLogprob(
            token_id=token, token=entry.decoded_token, logprob=entry.logprob, rank=entry.rank
        )
        for token, entry in at.items()
    }
    # The chosen token stands last in `at` where it is not one of the alternatives.
    return pb.PositionLogprobs(chosen=messages[chosen], top=list(messages.values())[:alternatives])
