"""The wire: every field both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quire import SamplingParams, protos
from quire.errors import (
    CheckpointError,
    DeadlineExceeded,
    Internal,
    InvalidConfig,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    QuireError,
    Unauthenticated,
    Unavailable,
)
from quire.protos.v1 import generation_pb2 as pb
from quire.sched.request import Timing
from quire.serving.answer import Chunk, Completion, Logprob
from quire.serving.frontend.wire import (
    chunk_message,
    labels_of,
    prompt_of,
    response_message,
    sampling_message,
    sampling_of,
)
from quire.serving.intake import Labels

SET = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.75,
    "min_p": 0.25,
    "seed": 2**64 - 1,
    "max_tokens": 9,
    "min_tokens": 2,
    "stop": ("a", "b"),
    "stop_token_ids": (4, 5),
    "ignore_eos": True,
    "logprobs": 4,
    "skip_special_tokens": False,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {7: 2.5},
    "allowed_token_ids": (7, 8),
    "bad_words": ("no", (1, 2)),
    "prompt_logprobs": 3,
    "n": 2,
    "best_of": 3,
}
MESSAGES = {
    "allowed_token_ids": pb.TokenIds(ids=[7, 8]),
    "bad_words": [pb.BadWord(text="no"), pb.BadWord(token_ids=pb.TokenIds(ids=[1, 2]))],
}


def test_every_field_of_sampling_is_read() -> None:
    assert set(SET) == {f.name for f in pb.SamplingParams.DESCRIPTOR.fields}
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**{**SET, **MESSAGES}))
    assert sampling_of(request) == SET
    SamplingParams(**SET)  # the same names and meanings offline


def test_unset_is_the_models_default_and_an_explicit_zero_is_zero() -> None:
    assert sampling_of(pb.GenerateRequest(text="x")) == {}
    assert sampling_of(pb.GenerateRequest(text="x", sampling=pb.SamplingParams())) == {}
    zeros: dict[str, Any] = {}
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if field.name == "allowed_token_ids":
            assert field.has_presence
        elif not isinstance(SET[field.name], tuple | dict):  # lists are unset when empty
            assert field.has_presence, f"{field.name} must tell unset from zero"
            zeros[field.name] = field.default_value
    assert sampling_of(pb.GenerateRequest(sampling=pb.SamplingParams(**zeros))) == zeros


def test_sampling_there_and_back() -> None:
    params = SamplingParams(**SET)
    message = pb.GenerateRequest(sampling=sampling_message(params))
    assert sampling_of(message) == SET
    assert SamplingParams(**sampling_of(message)) == params


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 101.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", 2**32 - 1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("max_tokens", 2**32 - 1),
        ("min_tokens", 2**32 - 1),
        ("logprobs", 21),
        ("stop", [""]),
        ("stop", ["x" * 1025]),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [1] * 17),
        ("stop_token_ids", [2**32 - 1]),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", float("nan")),
        ("allowed_token_ids", pb.TokenIds()),
        ("bad_words", [pb.BadWord()]),
        ("bad_words", [pb.BadWord(token_ids=pb.TokenIds())]),
        ("prompt_logprobs", 21),
        ("n", 0),
        ("best_of", 129),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**{field: value}))
    with pytest.raises(InvalidRequest, match=f"^{field}: got .*, must be "):
        SamplingParams(**sampling_of(request))


def test_prompts() -> None:
    assert prompt_of(pb.GenerateRequest(text="hello")) == "hello"
    ids = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2]))
    assert prompt_of(ids) == [1, 2]
    assert prompt_of(pb.GenerateRequest(text="")) == ""
    assert prompt_of(pb.GenerateRequest(token_ids=pb.TokenIds())) == []
    with pytest.raises(InvalidRequest, match="prompt: got none, must be text, token_ids or chat"):
        prompt_of(pb.GenerateRequest())


def test_everything_else_is_a_label() -> None:
    request = pb.GenerateRequest(text="x", request_id="r", priority=-2, tenant="t", cache_salt="s")
    labels = labels_of(request, deadline=4.5)
    assert labels == Labels("r", priority=-2, tenant="t", cache_salt="s", deadline=4.5)
    prompts = {"text", "token_ids", "chat"}
    read = {*prompts, "sampling", "request_id", "priority", "tenant", "cache_salt"}
    assert {f.name for f in pb.GenerateRequest.DESCRIPTOR.fields} == read


LOGPROBS = [
    {5: Logprob(-0.25, 1, "five"), 7: Logprob(-1.0, 2, "seven")},
    {5: Logprob(-0.5, 1, "five"), 7: Logprob(-1.5, 2, "seven"), 8: Logprob(-2.5, 9, "eight")},
]
USAGE = pb.Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
TIMING = Timing(queue_seconds=0.5, prefill_seconds=0.25, decode_seconds=2.0, preemptions=1)


def as_tuples(position: pb.PositionLogprobs) -> list[tuple[int, str, float, int]]:
    entries = [position.chosen, *position.top]
    return [(e.token_id, e.token, e.logprob, e.rank) for e in entries]


SAMPLING = SamplingParams(logprobs=2, prompt_logprobs=1)


def test_a_response_has_every_field() -> None:
    completions = [
        Completion(0, "text", [7, 8], -1.5, LOGPROBS, "stop", "\n"),
        Completion(1, "more", [7], None, None, "length", None),
    ]
    message = response_message(
        completions,
        SAMPLING,
        prompt=(4, 7),
        prompt_logprobs=[None, LOGPROBS[0]],
        request_id="r",
        usage=USAGE,
        timing=TIMING,
    )
    assert {f.name for f, _ in message.ListFields()} == set(
        pb.GenerateResponse.DESCRIPTOR.fields_by_name
    )
    assert (message.request_id, message.text, list(message.token_ids)) == ("r", "text", [7, 8])
    assert message.finish_reason == pb.FINISH_REASON_STOP
    assert message.stop_reason == pb.StopReason(stop="\n")
    assert (message.usage, message.cumulative_logprob) == (USAGE, -1.5)
    assert message.timing == pb.Timing(
        queue_seconds=0.5, prefill_seconds=0.25, decode_seconds=2.0, preemptions=1
    )
    five, seven, eight = (5, "five", -0.5, 1), (7, "seven", -1.5, 2), (8, "eight", -2.5, 9)
    assert [e[0] for e in as_tuples(message.logprobs[0])] == [7, 5, 7]
    # A chosen token that is none of the alternatives is not among them.
    assert as_tuples(message.logprobs[1]) == [eight, five, seven]
    nothing, second = message.prompt_logprobs
    assert not nothing.HasField("chosen") and not nothing.top
    assert [e[0] for e in as_tuples(second)] == [7, 5]
    first, other = message.choices
    assert {f.name for f, _ in first.ListFields()} | {"index"} == set(
        pb.Choice.DESCRIPTOR.fields_by_name
    )
    assert (first.text, first.stop_reason, first.logprobs) == (
        message.text,
        message.stop_reason,
        message.logprobs,
    )
    assert (other.index, other.text, list(other.token_ids)) == (1, "more", [7])
    assert not other.HasField("stop_reason") and not other.HasField("cumulative_logprob")


def test_a_response_of_one_answer_says_it_once() -> None:
    message = response_message(
        [Completion(0, "text", [7], None, None, "length")],
        SamplingParams(),
        prompt=(1,),
        prompt_logprobs=None,
        request_id="r",
        usage=USAGE,
    )
    assert not message.choices and not message.HasField("stop_reason")
    assert not message.HasField("cumulative_logprob")


def chunk_of(chunk: Chunk, sampling: SamplingParams = SAMPLING, **more: Any) -> pb.GenerateChunk:
    return chunk_message(
        chunk, sampling, prompt=(4, 7), **{"request_id": "", "usage": None, **more}
    )


def test_a_chunk_has_every_field() -> None:
    scores = [None, LOGPROBS[0]]
    chunk = Chunk(
        "text", [7, 8], LOGPROBS, "length", 8, index=1, prompt_logprobs=scores, timing=TIMING
    )
    message = chunk_of(chunk, request_id="r", usage=USAGE)
    assert {f.name for f, _ in message.ListFields()} == set(
        pb.GenerateChunk.DESCRIPTOR.fields_by_name
    )
    assert message.finish_reason == pb.FINISH_REASON_LENGTH and message.index == 1
    assert message.stop_reason == pb.StopReason(stop_token_id=8)
    assert [len(p.top) for p in message.logprobs] == [2, 2]
    assert [len(p.top) for p in message.prompt_logprobs] == [0, 1]


def test_a_chunk_in_the_middle_is_small() -> None:
    message = chunk_of(Chunk("t", [7]))
    assert [f.name for f, _ in message.ListFields()] == ["text", "token_ids"]
    assert message.finish_reason == pb.FINISH_REASON_UNSPECIFIED
    assert not message.HasField("stop_reason")


def test_log_probabilities_of_the_chosen_token_alone() -> None:
    chunk = Chunk("t", [7], [{7: Logprob(-1.0, 3, "seven")}])
    message = chunk_of(chunk, SamplingParams(logprobs=0))
    assert as_tuples(message.logprobs[0]) == [(7, "seven", -1.0, 3)]


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"stop": ["x"] * 17}, "stop: got '17 entries', must be at most 16"),
        ({"stop_token_ids": [1] * 5000}, "stop_token_ids: got '5000 entries'"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias: got '301 entries'"),
        ({"allowed_token_ids": pb.TokenIds(ids=[1] * 2_000_000)}, "allowed_token_ids: got '20000"),
        ({"bad_words": [pb.BadWord(text="x")] * 65}, "bad_words: got '65 entries'"),
        ({"bad_words": [pb.BadWord(token_ids=pb.TokenIds(ids=[1] * 9))]}, "bad_words: got '9 ids'"),
    ],
)
def test_lists_are_counted_before_they_are_copied(sampling: Any, says: str) -> None:
    request = pb.GenerateRequest(sampling=pb.SamplingParams(**sampling))
    with pytest.raises(InvalidRequest) as caught:
        sampling_of(request)
    assert str(caught.value).startswith(says)
    prompt = prompt_of(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2])))
    assert not isinstance(prompt, list | tuple) and list(prompt) == [1, 2]


def test_the_contract_names_every_status_a_call_can_end_with() -> None:
    text = (Path(protos.__file__).parent / "v1" / "generation.proto").read_text()
    header = text.partition("syntax =")[0]
    listed = re.findall(r"^//   ([A-Z_]+) +\S", header, re.MULTILINE)
    kinds = [InvalidRequest, Unauthenticated, PermissionDenied, Overloaded]
    kinds += [DeadlineExceeded, Unavailable, Internal]
    before_serving = {InvalidConfig, CheckpointError}
    ours = {
        kind for kind in QuireError.__subclasses__() if kind.__module__ == QuireError.__module__
    }
    assert ours - before_serving == set(kinds)
    assert listed == [kind.grpc_code for kind in kinds]
