"""What the engine's own types are after a journey between processes: the same, field by field."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from quire.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    QuireError,
    Unauthenticated,
    Unavailable,
)
from quire.model.ladder import make_ladder
from quire.model.plan import RunnerSpec
from quire.protos.v1 import engine_pb2 as pb
from quire.sched.request import (
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    Timing,
    TokenLogprobs,
)
from quire.serving import engine_wire as wire

SAMPLING: dict[str, Any] = {
    "temperature": 0.1,
    "top_k": 5,
    "top_p": 0.3,
    "min_p": 0.7,
    "repetition_penalty": 1.3,
    "presence_penalty": -0.4,
    "frequency_penalty": 1.9,
    "logit_bias": {3: -1.1, 4: 100.0},
    "allowed_token_ids": (7, 8),
    "bad_words": ((1,), (2, 3)),
    "seed": 2**64 - 1,
    "max_tokens": 9,
    "min_tokens": 2,
    "stop_token_ids": (11, 12),
    "ignore_eos": True,
    "logprobs": 0,
    "prompt_logprobs": 20,
    "n": 2,
    "best_of": 3,
}
OF_TEXT = {"stop", "skip_special_tokens"}
"""What the engine does not look at."""

REQUEST: dict[str, Any] = {
    "id": "mine/1",
    "prompt": (1, 2, 2**31 - 1),
    "sampling": SamplingParams(**SAMPLING),
    "eos_ids": (5, 6),
    "priority": -3,
    "tenant": "they",
    "deadline": 1e9,
    "adapter": 1,
    "cache_salt": "salt",
    "pooled": True,
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "vendor=its own",
}

OUTPUT: dict[str, Any] = {
    "request_id": "mine/1",
    "tokens": (4, 0),
    "logprobs": (
        TokenLogprobs(4, -0.5, 1, ((4, -0.5), (9, -2.0))),
        TokenLogprobs(0, -7.25, 30, ((1, -0.125), (2, -3.0))),
    ),
    "finish_reason": FinishReason.STOP,
    "stop_token": 0,
    # Are not compared; see below.
    "error": None,
    "pooled": None,
    "cached_tokens": 32,
    "choice": 3,
    "ended": True,
    "prompt_logprobs": (None, TokenLogprobs(3, -1.5, 2), TokenLogprobs(3, -1.75, 2)),
    "timing": Timing(0.1, 0.2, 30.3, 4),
}
OF_THE_ENGINE = {"account"}
"""What stays in its process."""


def unlike_defaults(kind: Any, given: dict[str, Any], leaving_out: set[str]) -> None:
    """Every field is given, and not as it is by itself, so that one left behind would be seen."""
    assert {f.name for f in fields(kind) if f.init} - leaving_out == set(given)
    for f in fields(kind):
        if f.name in given and f.name not in ("error", "pooled"):
            assert given[f.name] != f.default


def sent(request: Request) -> Request:
    message = wire.submit_message(1, request)
    return wire.request_of(pb.Submit.FromString(message.SerializeToString()))


def received(output: RequestOutput) -> RequestOutput:
    message = wire.output_message(1, output)
    return wire.output_of(pb.Output.FromString(message.SerializeToString()), output.request_id)


def test_a_request_arrives_whole() -> None:
    unlike_defaults(SamplingParams, SAMPLING, OF_TEXT)
    unlike_defaults(Request, REQUEST, set())
    request = Request(**REQUEST)
    arrived = sent(request)
    assert arrived.deadline == pytest.approx(1e9, abs=1.0)
    assert replace(arrived, deadline=1e9) == request


@pytest.mark.parametrize("name", ["max_tokens", "logprobs", "prompt_logprobs", "best_of"])
def test_what_is_unset_stays_unset(name: str) -> None:
    sampling = SamplingParams(**{**SAMPLING, "min_tokens": 0, name: None})
    request = Request(id="r", prompt=(1,), sampling=sampling)
    assert sent(request) == request


def test_allowing_all_tokens_is_not_allowing_none() -> None:
    request = Request(id="r", prompt=(1,), sampling=SamplingParams(seed=1))
    assert sent(request) == request and request.sampling.allowed_token_ids is None


def test_a_negative_seed_keeps_its_bits() -> None:
    request = Request(id="r", prompt=(1,), sampling=SamplingParams(seed=-2))
    assert sent(request).sampling.seed == 2**64 - 2


def test_a_deadline_travels_as_what_is_left() -> None:
    request = Request(id="r", prompt=(1,), sampling=SamplingParams(seed=1), deadline=0.0)
    message = wire.submit_message(1, replace(request, deadline=time.monotonic() + 5000))
    assert 4900 < message.seconds_left <= 5000
    assert not wire.submit_message(1, replace(request, deadline=None)).HasField("seconds_left")
    late = sent(request).deadline  # passed already
    assert late is not None and late < time.monotonic()


def test_an_output_arrives_whole() -> None:
    unlike_defaults(RequestOutput, OUTPUT, OF_THE_ENGINE)
    output = RequestOutput(**OUTPUT)
    assert received(output) == output
    assert received(RequestOutput("r", (1,))) == RequestOutput("r", (1,))
    empty = RequestOutput("r", (), logprobs=(), prompt_logprobs=(None,))
    assert received(empty) == empty


def test_an_embedding_arrives_bit_for_bit() -> None:
    given = np.array([0.1, -1e-30, 3e38], np.float32)
    arrived = received(RequestOutput("r", pooled=given)).pooled
    assert arrived is not None and arrived.dtype == np.float32
    assert arrived.tolist() == given.tolist()
    assert received(RequestOutput("r")).pooled is None


@pytest.mark.parametrize(
    "kind",
    [InvalidRequest, Unauthenticated, PermissionDenied, DeadlineExceeded, Unavailable, Internal],
)
def test_an_error_stays_what_it_is(kind: type[QuireError]) -> None:
    output = RequestOutput("r", finish_reason=FinishReason.ERROR, error=kind("why"), ended=True)
    error = received(output).error
    assert type(error) is kind and str(error) == "why"


def test_an_error_from_the_engine_is_not_accounted_for_again() -> None:
    given = Internal("why")
    output = RequestOutput("r", finish_reason=FinishReason.ERROR, error=given, ended=True)
    error = received(output).error
    assert error is not None and error.accounted and not given.accounted
    message = wire.refused_message(Overloaded("full"), "r", "they")
    assert (message.request_id, message.tenant) == ("r", "they")
    assert isinstance(wire.error_of(message.error), Overloaded)


def test_a_retry_hint_arrives() -> None:
    error = wire.error_of(wire.error_message(Overloaded("full", retry_after=2.5)))
    assert isinstance(error, Overloaded) and error.retry_after == 2.5


def test_limits_arrive_whole() -> None:
    spec = RunnerSpec(
        num_slots=2,
        num_pages=3,
        page_size=4,
        max_pages_per_seq=5,
        max_model_len=6,
        vocab_size=7,
        ladder=make_ladder(8, 64, max_k=2),
        max_k=2,
    )
    arrived = wire.spec_of(wire.limits_message(spec))
    for f in fields(spec):
        if f.name != "ladder":
            assert getattr(arrived, f.name) == getattr(spec, f.name)
    assert arrived.ladder.buckets == spec.ladder.buckets
