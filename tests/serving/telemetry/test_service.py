"""What a service that answers over gRPC lets be known of its requests, and what not."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from engines import eventually
from prometheus_client import generate_latest
from running import Running
from scripted import Kept, samples_in

from quire.protos.v1 import generation_pb2 as pb
from quire.sched.quota import Limits, Quotas
from quire.sched.request import POOLED_SAMPLING, Request
from quire.serving.intake import Intake
from quire.serving.telemetry.logs import JsonFormatter
from quire.serving.telemetry.telemetry import Telemetry

MARKER = "xylophone"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = "vendor=its-own"


class Told:
    """A service's telemetry with everything in it that tests look at."""

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self.registry = self.telemetry.keep_metrics()
        self.kept = Kept()
        self.telemetry.add(self.kept)
        self.telemetry.log_requests(prompts=False)  # last: once its line is there, all have heard
        self.log = io.StringIO()

    def line(self, name: str) -> dict[str, Any]:
        """The line about the request that its caller gave this name, once it is there."""
        found: list[dict[str, Any]] = []

        def written() -> bool:
            lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
            found[:] = [x for x in lines if x.get("request_id", "").split("/")[0] == name]
            return any(line["message"] in ("request ended", "request refused") for line in found)

        eventually(written)
        return next(line for line in found if "code" in line)


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    told = Told()
    handler = logging.StreamHandler(told.log)
    handler.setFormatter(JsonFormatter())
    own = logging.getLogger("quire")
    before = own.level
    own.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)  # whoever's message it is
    yield told
    logging.getLogger().removeHandler(handler)
    own.setLevel(before)
    told.telemetry.close()


@pytest.fixture(scope="module")
def served(folder: Path, told: Told) -> Iterator[Running]:
    with Running(folder, telemetry=told.telemetry) as running:
        yield running.open()


def ask(text: str = f"{MARKER} and more", **more: Any) -> pb.GenerateRequest:
    sampling = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **more.pop("sampling", {})}
    return pb.GenerateRequest(text=text, sampling=pb.SamplingParams(**sampling), **more)


def test_an_answer_is_accounted_for(served: Running, told: Told) -> None:
    request = ask(request_id="mine", tenant="acme")
    response = served.stub.Generate(
        request, timeout=60, metadata=[("traceparent", PARENT), ("tracestate", STATE)]
    )
    line = told.line("mine")
    assert line["message"] == "request ended"
    assert (line["tenant"], line["finish_reason"], line["code"]) == ("acme", "length", None)
    assert line["prompt_tokens"] == response.usage.prompt_tokens
    assert line["output_tokens"] == 6 and line["preemptions"] == 0
    assert line["trace_id"] == PARENT.split("-")[1]
    timing = response.timing
    for part in ("queue_seconds", "prefill_seconds", "decode_seconds"):
        assert getattr(timing, part) == pytest.approx(line[part], abs=2e-6)
    report = told.kept.reports[-1]
    assert (report.traceparent, report.tracestate) == (PARENT, STATE)


def test_an_answer_ended_by_its_text_has_a_timing(served: Running, told: Told) -> None:
    text = served.stub.Generate(ask(sampling={"max_tokens": 24}), timeout=60).text
    request = ask(request_id="cut", sampling={"max_tokens": 200, "stop": [text[8:10]]})
    response = served.stub.Generate(request, timeout=60)
    assert response.finish_reason == pb.FINISH_REASON_STOP
    assert response.timing.prefill_seconds > 0
    *_, last = served.stub.StreamGenerate(request, timeout=60)
    assert last.finish_reason == pb.FINISH_REASON_STOP and last.timing.prefill_seconds > 0
    assert told.line("cut")["finish_reason"] == "stop"


def test_prompts_and_answers_stay_out_of_the_log(
    served: Running, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends a request, and whatever field held the words."""
    call, before = served.stub.Generate, len(told.log.getvalue())
    answer = call(ask(), timeout=60).text
    called = pb.ChatMessage(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments=MARKER)])
    refused = [
        ask(sampling={"stop": [MARKER * 5000]}),
        ask(sampling={"bad_words": [pb.BadWord(text=f"{MARKER} " * 40)]}),
        ask(sampling={"temperature": -1.0}),
        ask(f"{MARKER} " * 9000),
        ask(cache_salt=MARKER * 100),
        pb.GenerateRequest(chat=pb.ChatPrompt(messages=[called])),
    ]
    for request in refused:
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, request
    with pytest.raises(grpc.RpcError):
        call(ask(sampling={"max_tokens": None}), timeout=0.2)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(Intake, "choices", broken)
    with pytest.raises(grpc.RpcError):
        call(ask(request_id="unlucky", tenant="acme"), timeout=60)
    assert told.line("unlucky")["code"] == "INTERNAL"
    lines = [json.loads(line) for line in told.log.getvalue()[before:].splitlines()]
    codes = [line["code"] for line in lines if line["message"] == "request refused"]
    assert codes == ["INVALID_ARGUMENT"] * len(refused) + ["INTERNAL"]
    (fault,) = [line for line in lines if line["message"].endswith(": a call failed")]
    assert (fault["request_id"], fault["tenant"]) == ("unlucky", "acme")
    assert "RuntimeError: a fault" in fault["exception"]
    assert MARKER not in told.log.getvalue() and answer not in told.log.getvalue()


def test_errors_are_counted_once_wherever_they_arise(served: Running, told: Told) -> None:
    def errors() -> dict[str, float]:
        told.telemetry.flush(20)
        samples = samples_in(generate_latest(told.registry).decode())
        return {
            dict(labels)["code"]: value
            for (name, labels), value in samples.items()
            if name == "quire_request_errors_total" and dict(labels)["tenant"] == "counted"
        }

    def fails(**more: Any) -> None:
        with pytest.raises(grpc.RpcError):
            served.stub.Generate(ask(tenant="counted", **more), timeout=60)

    def fault(handle: Any) -> Any:
        raise RuntimeError("no device")

    assert errors() == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine._scheduler._arrivals, "_max_queue", 0)
        fails()  # by the engine's queue
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.parts.runner, "collect", fault)
        fails()  # in the engine, after it was accepted
    fails(sampling={"top_p": 7.0})  # by the frontend
    expected = {"RESOURCE_EXHAUSTED": 1, "INTERNAL": 1, "INVALID_ARGUMENT": 1}
    eventually(lambda: errors() == expected)


def test_an_embedding_that_waits_for_room_was_not_refused(
    served: Running, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tried again is no refusal; a call that is given up before anything came of it is."""

    def codes(name: str) -> list[str | None]:
        told.telemetry.flush(20)
        lines = [json.loads(line) for line in told.log.getvalue().splitlines()]
        return [x["code"] for x in lines if "code" in x and x["request_id"].startswith(name)]

    def embed(name: str, inputs: int, *, used: int = 0, **limits: int) -> None:
        quotas = Quotas(time.monotonic)
        quotas.update({"list": Limits(**limits)})
        for n in range(used):
            quotas.accept(
                Request(id=f"used {n}", prompt=(1,), sampling=POOLED_SAMPLING, tenant="list")
            )
        monkeypatch.setattr(served.engine, "_quotas", quotas)
        given = [pb.EmbedInput(token_ids=pb.TokenIds(ids=[n + 1])) for n in range(inputs)]
        request = pb.EmbedRequest(inputs=given, request_id=name, tenant="list")
        served.stub.Embed(request, timeout=60)

    embed("patient", 30, concurrency=2)
    eventually(lambda: len(codes("patient")) >= 30)  # the last is told of while it is sent
    assert codes("patient") == [None] * 30
    embed("slow", 6, used=1197, requests_per_minute=1200)
    eventually(lambda: len(codes("slow")) >= 6)
    assert codes("slow") == [None] * 6
    with pytest.raises(grpc.RpcError) as caught:
        embed("hopeless", 9, used=3, requests_per_minute=3)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    eventually(lambda: "RESOURCE_EXHAUSTED" in codes("hopeless"))
    assert codes("hopeless") == ["RESOURCE_EXHAUSTED"]
