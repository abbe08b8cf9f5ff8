"""Between protos/v1/engine.proto and the engine's own types, for both ends. Pure conversion.

A field that is added to Request, SamplingParams, RequestOutput or RunnerSpec is carried over here
and nowhere else; tests/serving/test_engine_wire.py finds one that was forgotten.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from ..errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    QuireError,
    Unauthenticated,
    Unavailable,
)
from ..model.plan import Bucket, Ladder, RunnerSpec, Sampler
from ..protos.v1 import engine_pb2 as pb
from ..sched.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    Timing,
    TokenLogprobs,
)

PROTOCOL = 3
"""Of engine.proto: raised whenever its meaning changes."""


@dataclass(frozen=True)
class Liveness:
    """How either end of a stream shows that it lives, and when the other is taken for gone.

    Attributes:
      heartbeat: seconds after which an end that has nothing to say says that.
      silence: seconds without a word after which the other end counts as gone.
    """

    heartbeat: float = 1.0
    silence: float = 15.0


LIVENESS = Liveness()

_ERRORS: dict[str, type[QuireError]] = {
    kind.grpc_code: kind
    for kind in (
        InvalidRequest,
        Overloaded,
        Unauthenticated,
        PermissionDenied,
        DeadlineExceeded,
        Unavailable,
        Internal,
    )
}

_SAME = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "max_tokens",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
    "n",
    "best_of",
)
"""Sampling parameters that look alike on both sides."""

_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "best_of")
_LISTS = ("logit_bias", "stop_token_ids")
_PLAIN = {
    parameter.name: parameter.default
    for parameter in fields(SamplingParams)
    if parameter.name in _SAME and parameter.name not in (*_OPTIONAL, *_LISTS)
}
"""The others of them, each with its default."""

_SEED_BITS = (1 << 64) - 1


# Requests


def submit_message(handle: int, request: Request) -> pb.Submit:
    """A request on its way to the engine process."""
    left = None if request.deadline is None else request.deadline - time.monotonic()
    return pb.Submit(
        handle=handle,
        id=request.id,
        prompt=array("i", request.prompt).tobytes(),
        sampling=_sampling_message(request.sampling),
        eos_ids=request.eos_ids,
        priority=request.priority,
        tenant=request.tenant,
        seconds_left=left,
        adapter=request.adapter,
        cache_salt=request.cache_salt,
        pooled=request.pooled,
        traceparent=request.traceparent,
        tracestate=request.tracestate,
    )


def request_of(message: pb.Submit) -> Request:
    """The request, with its deadline on this process's clock."""
    has_deadline = message.HasField("seconds_left")
    return Request(
        id=message.id,
        prompt=tuple(memoryview(message.prompt).cast("i")),
        sampling=_sampling_of(message.sampling),
        eos_ids=tuple(message.eos_ids),
        priority=message.priority,
        tenant=message.tenant,
        deadline=time.monotonic() + message.seconds_left if has_deadline else None,
        adapter=message.adapter,
        cache_salt=message.cache_salt,
        pooled=message.pooled,
        traceparent=message.traceparent,
        tracestate=message.tracestate,
    )


def _sampling_message(sampling: SamplingParams) -> pb.Sampling:
    assert sampling.seed is not None, "serving/intake.py draws one"
    allowed = sampling.allowed_token_ids
    return pb.Sampling(
        seed=sampling.seed & _SEED_BITS,
        allowed_token_ids=None if allowed is None else pb.Ids(ids=allowed),
        bad_words=[pb.Ids(ids=word) for word in sampling.bad_words if not isinstance(word, str)],
        **{name: getattr(sampling, name) for name in _SAME},
    )


def _sampling_of(message: pb.Sampling) -> SamplingParams:
    # What is as it would be anyway is not said again, because all that is said is checked.
    given = {
        name: value
        for name, default in _PLAIN.items()
        if (value := getattr(message, name)) != default
    }
    given |= {name: value for name in _LISTS if (value := getattr(message, name))}
    given |= {
        name: getattr(message, name) if message.HasField(name) else None for name in _OPTIONAL
    }
    has_allowed = message.HasField("allowed_token_ids")
    return SamplingParams(
        **given,
        seed=message.seed,
        allowed_token_ids=tuple(message.allowed_token_ids.ids) if has_allowed else None,
        bad_words=tuple(tuple(word.ids) for word in message.bad_words),
    )


# Outputs


def output_message(handle: int, output: RequestOutput) -> pb.Output:
    """An output with all there is to it; the rows of a Step hold the others."""
    return pb.Output(
        handle=handle,
        choice=output.choice,
        tokens=output.tokens,
        logprobs=_logprobs_message(output.logprobs),
        prompt_logprobs=_logprobs_message(output.prompt_logprobs),
        finish_reason=output.finish_reason or "",
        stop_token=output.stop_token,
        error=None if output.error is None else error_message(output.error),
        cached_tokens=output.cached_tokens,
        ended=output.ended,
        pooled=None if output.pooled is None else output.pooled.astype("<f4").tobytes(),
        timing=None if output.timing is None else pb.Timing(**asdict(output.timing)),
    )


def output_of(message: pb.Output, request_id: str) -> RequestOutput:
    """The output, of the request that has the message's handle."""
    error = error_of(message.error) if message.HasField("error") else None
    if error is not None:
        error.accounted = True  # by the engine process, where it comes from
    scores = message.prompt_logprobs if message.HasField("prompt_logprobs") else None
    unknown = (None,) if scores is not None and scores.after_unknown else ()
    return RequestOutput(
        request_id,
        tuple(message.tokens),
        logprobs=_logprobs_of(message.logprobs) if message.HasField("logprobs") else None,
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        stop_token=message.stop_token if message.HasField("stop_token") else None,
        error=error,
        cached_tokens=message.cached_tokens,
        choice=message.choice,
        ended=message.ended,
        prompt_logprobs=None if scores is None else (*unknown, *_logprobs_of(scores)),
        pooled=np.frombuffer(message.pooled, "<f4") if message.HasField("pooled") else None,
        timing=_timing_of(message.timing) if message.HasField("timing") else None,
    )


def _timing_of(message: pb.Timing) -> Timing:
    return Timing(**{f.name: getattr(message, f.name) for f in fields(Timing)})


def _logprobs_message(entries: Sequence[TokenLogprobs | None] | None) -> pb.Logprobs | None:
    if entries is None:
        return None
    known = [entry for entry in entries if entry is not None]
    return pb.Logprobs(
        tokens=[entry.token for entry in known],
        logprobs=[entry.logprob for entry in known],
        ranks=[entry.rank for entry in known],
        top_tokens=[token for entry in known for token, _ in entry.top],
        top_logprobs=[value for entry in known for _, value in entry.top],
        after_unknown=len(known) < len(entries),
    )


def _logprobs_of(message: pb.Logprobs) -> tuple[TokenLogprobs, ...]:
    count = len(message.tokens)
    width = len(message.top_tokens) // count if count else 0
    top = tuple(zip(message.top_tokens, message.top_logprobs, strict=True))
    return tuple(
        TokenLogprobs(token, value, rank, top[at * width : (at + 1) * width])
        for at, (token, value, rank) in enumerate(
            zip(message.tokens, message.logprobs, message.ranks, strict=True)
        )
    )


def error_message(error: QuireError) -> pb.Error:
    retry_after = error.retry_after if isinstance(error, Overloaded) else None
    return pb.Error(code=error.grpc_code, message=str(error), retry_after=retry_after)


def error_of(message: pb.Error) -> QuireError:
    kind = _ERRORS.get(message.code, Internal)
    if issubclass(kind, Overloaded):
        return kind(message.message, retry_after=message.retry_after)
    return kind(message.message)


def refused_message(error: QuireError, request_id: str, tenant: str) -> pb.Refused:
    """An error that the engine process has not heard of."""
    return pb.Refused(request_id=request_id, tenant=tenant, error=error_message(error))


# What the engine says of itself


def limits_message(spec: RunnerSpec) -> pb.Limits:
    rungs = [
        pb.Rung(tokens=b.tokens, rows=b.rows, sampler=b.sampler, k=b.k) for b in spec.ladder.buckets
    ]
    own = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "ladder"}
    return pb.Limits(ladder=rungs, **own)


def spec_of(message: pb.Limits) -> RunnerSpec:
    own = {f.name: getattr(message, f.name) for f in fields(RunnerSpec) if f.name != "ladder"}
    rungs = [Bucket(r.tokens, r.rows, Sampler(r.sampler), r.k) for r in message.ladder]
    return RunnerSpec(ladder=Ladder(rungs), **own)
