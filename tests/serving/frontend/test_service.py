"""The gRPC service, called by a client over a real socket."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import tiny_checkpoint
from engines import Stepping, at_rest, eventually, held
from grpc import StatusCode
from running import SERVICE, Running

from quire import LLM, SamplingParams
from quire.config import ServerConfig
from quire.errors import Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.sched.request import FinishReason, RequestOutput
from quire.serving.answer import Answer
from quire.serving.choices import Choices
from quire.serving.engine_host.host import EngineHost
from quire.serving.frontend.answering import pushed
from quire.serving.frontend.pending import Pending
from quire.serving.frontend.server import Server
from quire.serving.intake import Intake

PROMPT = "the quick brown fox"


def ask(prompt: Any = PROMPT, request_id: str = "", **sampling: Any) -> pb.GenerateRequest:
    given = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **sampling}
    given = {name: value for name, value in given.items() if value is not None}
    request = pb.GenerateRequest(request_id=request_id, sampling=pb.SamplingParams(**given))
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


def long(**more: Any) -> pb.GenerateRequest:
    return ask(max_tokens=None, **more)


def joined(chunks: Any) -> pb.GenerateResponse:
    """A stream's messages as one response, by the proto's own rules."""
    whole = pb.GenerateResponse()
    chunks = list(chunks)
    for at, chunk in enumerate(chunks):
        is_last = at == len(chunks) - 1
        assert bool(chunk.request_id) == (at == 0)
        assert chunk.HasField("usage") == bool(chunk.finish_reason) == is_last
        assert chunk.HasField("timing") == is_last
        whole.request_id += chunk.request_id
        whole.text += chunk.text
        whole.token_ids.extend(chunk.token_ids)
        whole.logprobs.extend(chunk.logprobs)
    whole.finish_reason = chunks[-1].finish_reason
    if chunks[-1].HasField("stop_reason"):
        whole.stop_reason.CopyFrom(chunks[-1].stop_reason)
    whole.usage.CopyFrom(chunks[-1].usage)
    return whole


def refused(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        result = call()
        if not isinstance(result, pb.GenerateResponse):
            list(result)
    return caught.value


def test_an_error_of_any_length_arrives(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trailers of more than 8 KiB would make another error of it."""
    error = refused(lambda: served.stub.Generate(ask(stop=["😀" * 50_000]), timeout=60))
    assert error.code() is StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("stop: got '😀") and len(error.details()) < 1000

    def fail(*_: Any, **__: Any) -> None:
        raise Unavailable("é" * 50_000)

    monkeypatch.setattr(Intake, "default_sampling", fail)
    error = refused(lambda: served.stub.Generate(ask(), timeout=60))
    assert error.code() is StatusCode.UNAVAILABLE
    assert error.details().startswith("ééé") and error.details().endswith("é...")


# Answers


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.25, "seed": 11, "top_k": 40, "top_p": 0.75, "logprobs": 2},
        {"stop": ["hat"], "max_tokens": 200},
        {"stop_token_ids": [271], "max_tokens": 200, "min_tokens": 5, "logprobs": 0},
    ],
)
def test_generate_is_the_joined_stream_is_the_offline_answer(
    served: Running, llm: LLM, sampling: dict[str, Any]
) -> None:
    request = ask(request_id="same", **sampling)
    whole = served.stub.Generate(request, timeout=60)
    streamed = joined(served.stub.StreamGenerate(request, timeout=60))
    assert whole.timing.prefill_seconds > 0 and whole.timing.decode_seconds > 0
    for response in (whole, streamed):  # the second one finds the prompt cached
        response.usage.cached_tokens = 0
        response.ClearField("timing")
        response.ClearField("cumulative_logprob")  # of a whole answer only
    assert whole == streamed

    given = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **sampling}
    (result,) = llm.generate(PROMPT, SamplingParams(**given))
    expected = result.outputs[0]
    assert (whole.text, list(whole.token_ids)) == (expected.text, expected.token_ids)
    assert whole.finish_reason == pb.FinishReason.Value(
        f"FINISH_REASON_{str(expected.finish_reason).upper()}"
    )
    reason = whole.stop_reason.WhichOneof("reason")
    found = None if reason is None else getattr(whole.stop_reason, reason)
    assert found == expected.stop_reason
    assert len(whole.logprobs) == len(expected.logprobs or [])
    tokens = expected.token_ids[: len(whole.logprobs)]
    for message, token, at in zip(whole.logprobs, tokens, expected.logprobs or [], strict=True):
        assert message.chosen.token_id == token
        assert message.chosen.logprob == pytest.approx(at[token].logprob)
        assert [t.token_id for t in message.top] == list(at)[: sampling["logprobs"]]
    assert whole.usage.prompt_tokens == len(result.prompt_token_ids)
    assert whole.usage.completion_tokens == len(expected.token_ids)


def test_token_ids_and_text_are_the_same_prompt(served: Running) -> None:
    tokens = tiny_checkpoint.make_tokenizer().encode(PROMPT).ids
    by_text, by_ids = (served.stub.Generate(ask(p), timeout=60) for p in (PROMPT, tokens))
    assert by_text.token_ids == by_ids.token_ids


def test_what_is_unset_is_the_models_default(served: Running, llm: LLM) -> None:
    response = served.stub.Generate(pb.GenerateRequest(text=PROMPT), timeout=60)
    (result,) = llm.generate(PROMPT)
    assert list(response.token_ids) == result.outputs[0].token_ids


def test_usage_counts_cached_tokens(served: Running) -> None:
    prompt = list(range(100, 200))
    first, second = (served.stub.Generate(ask(prompt, stop=["a", "e"]), timeout=60) for _ in "12")
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 96
    assert second.usage.prompt_tokens == 100


# Request ids


def test_a_request_id_is_echoed_or_drawn(served: Running) -> None:
    assert served.stub.Generate(ask(request_id="mine"), timeout=60).request_id == "mine"
    drawn = {served.stub.Generate(ask(), timeout=60).request_id for _ in range(3)}
    assert len(drawn) == 3 and "" not in drawn


def test_a_request_id_in_use_is_refused(served: Running) -> None:
    with held(served.parts):
        stream = served.stub.StreamGenerate(ask(request_id="twice"), timeout=60)
        eventually(lambda: served.engine.stats().running == 1)
        error = refused(lambda: served.stub.Generate(ask(request_id="twice"), timeout=60))
        assert error.code() == StatusCode.INVALID_ARGUMENT
        assert "request_id: got 'twice'" in error.details()
    assert joined(stream).request_id == "twice"


def test_a_request_id_is_free_again_at_once(served: Running) -> None:
    # A stop string ends the call before the engine hears of it.
    request = ask(request_id="again", stop=["a", "e", "o"], max_tokens=200)
    first = served.stub.Generate(request, timeout=60)
    for _ in range(30):
        assert served.stub.Generate(request, timeout=60).text == first.text
    at_rest(served.engine)


# Refusals


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.GenerateRequest(), "prompt: got none"),
        (ask(""), "prompt: got no tokens"),
        (ask([]), "prompt: got no tokens"),
        (ask([1, 300]), "prompt[1]: got 300"),
        (ask([1] * 4096), "prompt: got 4096 tokens, must be at most 4095"),
        (ask(max_tokens=4096), "max_tokens: got 4096"),
        (ask(max_tokens=0), "max_tokens: got 0"),
        (ask(temperature=-1), "temperature: got -1.0"),
        (ask(logprobs=21), "logprobs: got 21, must be a whole number from 0 to 20"),
        (ask(min_tokens=25), "min_tokens: got 25, must be at most max_tokens (24)"),
        (ask(stop=[""]), "stop: got ''"),
        (ask(request_id="x" * 257), "request_id: got '257 characters'"),
        (pb.GenerateRequest(text="x", tenant="x" * 257), "tenant: got '257 characters'"),
        # Longer than grpc's own limit of 4 MB.
        (ask([270] * 2_200_000), "prompt: got 2200000 tokens"),
    ],
)
def test_invalid_requests_name_the_field(
    served: Running, request_: pb.GenerateRequest, says: str
) -> None:
    for call in (served.stub.Generate, served.stub.StreamGenerate):
        error = refused(lambda: call(request_, timeout=60))  # noqa: B023
        assert error.code() == StatusCode.INVALID_ARGUMENT
        assert says in error.details()
    at_rest(served.engine)


def test_a_fault_of_ours_is_internal_and_tells_no_secrets(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(served.parts.intake, "request", broken)
    for name, shown in (("mine", "'mine'"), ("", r"'[0-9a-f]{16}'")):
        error = refused(lambda: served.stub.Generate(ask(request_id=name), timeout=60))  # noqa: B023
        assert error.code() == StatusCode.INTERNAL
        says = rf"(request {shown}): a fault in Quire; the server's log says more"
        assert (found := re.fullmatch(says, error.details()))
        assert f"{found[1]}: a call failed" in caplog.text and "secret" in caplog.text


def test_a_full_queue_is_resource_exhausted_and_says_when_to_retry(folder: Path) -> None:
    with Running(folder, max_queue=1).open() as running, held(running.parts) as go:
        # Four slots and a queue of one: at least three of these have no place.
        calls = [running.stub.Generate.future(ask(), timeout=60) for _ in range(8)]
        eventually(lambda: sum(call.done() for call in calls) >= 3)
        go.set()
        errors = [error for call in calls if (error := call.exception()) is not None]
        assert 3 <= len(errors) <= 7
        for error in errors:
            assert error.code() == StatusCode.RESOURCE_EXHAUSTED
            assert "at most 1 may" in error.details()
            assert float(dict(error.trailing_metadata())["retry-after"]) >= 1


# Calls that end early


def test_a_deadline_ends_the_call_and_the_request(served: Running) -> None:
    with held(served.parts) as go:
        begin = time.monotonic()
        error = refused(lambda: served.stub.StreamGenerate(long(), timeout=0.5))
        assert error.code() == StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - begin < 20
        go.set()
        at_rest(served.engine)


def test_the_engine_knows_the_deadline(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    submit = served.engine.submit
    monkeypatch.setattr(served.engine, "submit", lambda r: (seen.append(r.deadline), submit(r)))
    served.stub.Generate(ask(), timeout=50)
    served.stub.Generate(ask())
    assert 0 < seen[0] - time.monotonic() < 51
    assert seen[1] is None


@pytest.mark.parametrize("waits_for_message", [True, False])
def test_a_cancelled_stream_frees_its_pages(served: Running, waits_for_message: bool) -> None:
    with held(served.parts) as go:
        streams = [served.stub.StreamGenerate(long(), timeout=60) for _ in range(6)]
        eventually(lambda: served.server._service.calls.running == 6)  # two more than slots
        eventually(lambda: served.engine.stats().running > 0)
        if waits_for_message:
            go.set()
            next(streams[0])
            go.clear()
        for stream in streams:
            stream.cancel()
        eventually(lambda: not served.server._service.calls.running)
        go.set()
        at_rest(served.engine)


def test_a_cancelled_call_frees_its_pages(served: Running) -> None:
    with held(served.parts) as go:
        call = served.stub.Generate.future(long(), timeout=60)
        eventually(lambda: served.engine.stats().running == 1)
        call.cancel()
        eventually(lambda: not served.server._service.calls.running)
        go.set()
        at_rest(served.engine)


CLIENT = """
import sys, time, grpc
from quire.protos.v1 import generation_pb2 as pb, generation_pb2_grpc as pb_grpc
stub = pb_grpc.GenerationServiceStub(grpc.insecure_channel(sys.argv[1]))
sampling = pb.SamplingParams(temperature=0, ignore_eos=True)
for chunk in stub.StreamGenerate(pb.GenerateRequest(text="x", sampling=sampling)):
    print("got one", flush=True)
    time.sleep(60)
"""


def test_a_client_that_dies_frees_its_pages(served: Running) -> None:
    address = served.server.address
    client = subprocess.Popen(
        [sys.executable, "-P", "-c", CLIENT, address], stdout=subprocess.PIPE, text=True
    )
    with held(served.parts) as go, client:
        eventually(lambda: served.engine.stats().running == 1, 60)
        go.set()
        assert client.stdout is not None and client.stdout.readline() == "got one\n"
        go.clear()  # so that the answer does not end before the client does
        client.kill()
        eventually(lambda: not served.server._service.calls.running)
        go.set()
        at_rest(served.engine)


class SlowContext:
    """A call whose client reads nothing until it may."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.messages: list[pb.GenerateChunk] = []

    def time_remaining(self) -> None:
        return None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: pb.GenerateChunk) -> None:
        self.messages.append(message)
        await self.may_read.wait()


def test_a_slow_reader_gets_few_large_messages(served: Running) -> None:
    request = ask(max_tokens=100, logprobs=1)
    whole = served.stub.Generate(request, timeout=60)
    eventually(lambda: not served.link._open)
    context: Any = SlowContext()
    with Stepping(served.parts) as steps:
        call = served.start(lambda: served.server._service.StreamGenerate(request, context))
        steps.step()
        eventually(lambda: len(context.messages) == 1)
        ((_, pending),) = served.link._open.values()
    eventually(lambda: pending._at_once)  # the end of the answer has come
    served.loop.call_soon_threadsafe(context.may_read.set)
    call.result(60)
    messages = context.messages
    assert len(messages) == 2
    assert len(messages[1].token_ids) > 50
    slow = joined(messages)
    assert (slow.text, slow.token_ids, slow.logprobs) == (
        whole.text,
        whole.token_ids,
        whole.logprobs,
    )


def test_a_call_cancelled_while_a_message_is_sent_frees_its_pages(served: Running) -> None:
    async def cancel_in_write() -> None:
        context = SlowContext()
        call = asyncio.ensure_future(
            served.server._service.StreamGenerate(long(), context)  # type: ignore[arg-type]
        )
        while not context.messages:
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    served.run(cancel_in_write)
    at_rest(served.engine)
    assert not served.server._service.calls.running


def test_the_engine_hears_why_a_call_ended(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    finish = served.engine.finish

    def spy(request_id: str, reason: FinishReason, choice: int | None) -> None:
        if request_id.startswith("spied"):  # of others it may hear late
            heard.append(reason.value)
        finish(request_id, reason, choice)

    monkeypatch.setattr(served.engine, "finish", spy)
    served.stub.Generate(ask(request_id="spied"), timeout=60)
    assert heard == []  # it ended the request itself
    stopped = ask(request_id="spied", stop=["a", "e", "o"], max_tokens=200)
    served.stub.Generate(stopped, timeout=60)
    eventually(lambda: heard == ["stop"])
    stream = served.stub.StreamGenerate(long(request_id="spied"), timeout=60)
    next(stream)
    stream.cancel()
    eventually(lambda: heard == ["stop", "abort"])
    at_rest(served.engine)


def test_what_came_before_an_error_is_the_callers() -> None:
    sampling = SamplingParams(n=2)
    choices = Choices(sampling, lambda: Answer(sampling, None, str))
    ended = RequestOutput("r", finish_reason=FinishReason.ERROR, error=Unavailable("gone"))
    pending = Pending("r")
    for output in [*(RequestOutput("r", (n,), choice=n % 2) for n in (1, 2, 3)), ended]:
        pending.put(output)
    chunks, error = pushed(choices, asyncio.run(pending.take()))
    assert [(chunk.index, chunk.token_ids) for chunk in chunks] == [(1, [1, 3]), (0, [2])]
    assert error is ended.error


# The server's life


def test_not_serving_before_it_is_open(folder: Path) -> None:
    with Running(folder) as running:
        watch = running.watch_health()
        names = ["", SERVICE]
        assert [running.health(name) for name in names] == ["NOT_SERVING"] * 2
        error = refused(lambda: running.stub.Generate(ask(), timeout=60))
        assert error.code() == StatusCode.UNAVAILABLE and "starting" in error.details()
        running.open()
        assert [running.health(name) for name in names] == ["SERVING"] * 2
        assert [next(watch).status, next(watch).status] == [2, 1]
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            running.health("another.Service")
        assert running.stub.Generate(ask(), timeout=60).usage.completion_tokens == 24


def test_a_drain_lets_running_calls_end_and_takes_no_more(folder: Path) -> None:
    with Running(folder).open() as running:
        running.watch_health()  # never ends by itself, and must not hold up the rest
        with held(running.parts) as go:
            stream = running.stub.StreamGenerate(ask(), timeout=60)
            eventually(lambda: running.engine.stats().running == 1)
            draining = running.start(running.server.drain)
            eventually(lambda: running.health() == "NOT_SERVING")
            error = refused(lambda: running.stub.Generate(ask(), timeout=60))
            assert error.code() == StatusCode.UNAVAILABLE and "stopping" in error.details()
            assert not draining.done()
            go.set()
            assert joined(stream).usage.completion_tokens == 24
            draining.result(20)
        begin = time.monotonic()
        running.run(running.server.stop)
        assert time.monotonic() - begin < 15
        assert not running.link.healthy


def test_a_stop_ends_running_calls_with_unavailable(folder: Path) -> None:
    with Running(folder).open() as running:
        stream = running.stub.StreamGenerate(long(), timeout=60)
        next(stream)
        stopping = running.start(running.server.stop)
        error = refused(lambda: stream)
        assert error.code() == StatusCode.UNAVAILABLE
        stopping.result(20)


def test_an_engine_that_dies_ends_its_calls(folder: Path) -> None:
    with Running(folder).open() as running, held(running.parts) as go:
        streams = [running.stub.StreamGenerate(long(), timeout=60) for _ in range(6)]
        eventually(lambda: len(running.engine._live) == 6)

        def broken(*_: Any) -> Any:
            raise RuntimeError("the device is gone")

        running.parts.runner.launch = broken  # type: ignore[method-assign]
        running.parts.runner.reset = broken  # type: ignore[method-assign]
        go.set()
        for stream in streams:
            error = refused(lambda: stream)  # noqa: B023
            assert error.code() == StatusCode.INTERNAL
            assert re.fullmatch(
                "request '.*': the engine failed; its log says why", error.details()
            )
        assert not running.engine.healthy
        error = refused(lambda: running.stub.Generate(ask(), timeout=60))
        assert error.code() == StatusCode.UNAVAILABLE


def test_a_server_without_its_engine_says_so_until_there_is_another(folder: Path) -> None:
    with Running(folder).open() as running:
        stream = running.stub.StreamGenerate(long(), timeout=60)
        next(stream)
        running.run(lambda: running._internal.stop(0))
        assert refused(lambda: stream).code() == StatusCode.UNAVAILABLE
        running.run(running.link.lost)
        at_rest(running.engine)  # it has heard that the frontend is gone
        running.run(lambda: running.server.pause("no engine"))
        assert running.health() == running.health(SERVICE) == "NOT_SERVING"
        error = refused(lambda: running.stub.Generate(ask(), timeout=60))
        assert error.code() == StatusCode.UNAVAILABLE and error.details() == "no engine"
        running.run(lambda: running.server.serve(running.link, running.parts.intake))
        assert running.health() == "SERVING"


def test_a_taken_port_is_an_error(served: Running) -> None:
    async def bind_again() -> None:
        server = Server(ServerConfig(port=served.server.port))
        try:
            await server.bind()
        finally:
            await server.stop()

    with pytest.raises(Unavailable, match=f"cannot bind 127.0.0.1:{served.server.port}"):
        asyncio.run(bind_again())


def test_a_host_that_cannot_be_resolved_is_not_called_a_taken_port() -> None:
    async def bind() -> None:
        server = Server(ServerConfig(host="no.such.host.invalid", port=0, insecure=True))
        try:
            await server.bind()
        finally:
            await server.stop()

    with pytest.raises(Unavailable, match="cannot be resolved") as caught:
        asyncio.run(bind())
    assert "another process" not in str(caught.value)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_ipv6_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")

    async def bind() -> str:
        server = Server(ServerConfig(host="::1", port=0))
        await server.bind()
        await server.stop()
        return server.address

    assert asyncio.run(bind()).startswith("[::1]:")


def test_outputs_after_the_loop_has_closed_do_no_harm() -> None:
    loop = asyncio.new_event_loop()
    host = EngineHost(loop)
    loop.close()
    engine_thread = threading.Thread(target=host.deliver, args=([RequestOutput("x")],))
    engine_thread.start()
    engine_thread.join(10)
    host.deliver([RequestOutput("x")])
