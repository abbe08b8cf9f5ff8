"""The clients against a scripted server over a real socket: what they send, and what comes back.

That they work with Quire's own server is shown wherever tests and benchmarks use them.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import quire
from quire.client import TLS, AsyncClient, Client, Retry, chat
from quire.client.channel import SERVICE
from quire.client.health import Wait
from quire.errors import (
    DeadlineExceeded,
    Internal,
    InvalidConfig,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    QuireError,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.serving.frontend.wire import prompt_of
from quire.serving.intake import Chat

FAST = Retry(first=0.01, longest=0.02)
WORDS = ["one ", "two ", "three"]


class Scripted(pb_grpc.GenerationServiceServicer):
    """Answers with WORDS; first fails as often as told. Notes what it was asked."""

    def __init__(self) -> None:
        self.failures: list[tuple[grpc.StatusCode, str]] = []
        self.requests: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.trailing: tuple[tuple[str, str], ...] = ()
        self.after_words: tuple[grpc.StatusCode, str] | None = None
        self.endless = False
        self.ended = threading.Event()  # the last call, for whatever reason

    def _asked(self, request: Any, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.failures:
            context.set_trailing_metadata(self.trailing)
            context.abort(*self.failures.pop(0))

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self._asked(request, context)
        return pb.GenerateResponse(text="".join(WORDS))

    def _taken(self, request: Any, context: grpc.ServicerContext, response: Any) -> Any:
        self._asked(request, context)
        return response

    def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        embeddings = [pb.Embedding(values=[1.0])] * len(request.inputs)
        return self._taken(request, context, pb.EmbedResponse(embeddings=embeddings))

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        return self._taken(request, context, pb.TokenizeResponse(token_ids=[1, 2]))

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        return self._taken(request, context, pb.DetokenizeResponse(text="two"))

    def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        return self._taken(request, context, pb.ModelInfo(name="model"))

    def StreamGenerate(self, request: pb.GenerateRequest, context: Any) -> Iterator[Any]:
        self._asked(request, context)
        self.ended.clear()
        context.add_callback(self.ended.set)
        for word in WORDS:
            yield pb.GenerateChunk(text=word)
        if self.after_words is not None:
            context.abort(*self.after_words)
        if self.endless:
            self.ended.wait(20)


@pytest.fixture
def server() -> Iterator[tuple[Scripted, str]]:
    service, grpc_server = Scripted(), grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_GenerationServiceServicer_to_server(service, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield service, f"127.0.0.1:{port}"
    grpc_server.stop(None).wait()


@contextmanager
def health_says(status: Any) -> Iterator[str]:
    """A server that has nothing but a health service; its address."""
    servicer, grpc_server = health.HealthServicer(), grpc.server(ThreadPoolExecutor(1))
    servicer.set(SERVICE, status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield f"127.0.0.1:{port}"
    grpc_server.stop(None).wait()


def blocking(address: str, work: Callable[[Client], Any], **settings: Any) -> Any:
    with Client(address, **{"retry": FAST, "timeout": 20, **settings}) as client:
        return work(client)


def awaited(address: str, work: Callable[[AsyncClient], Any], **settings: Any) -> Any:
    async def run() -> Any:
        async with AsyncClient(address, **{"retry": FAST, "timeout": 20, **settings}) as client:
            return await work(client)

    return asyncio.run(run())


def generate(kind: str, address: str, *args: Any, settings: Any = (), **fields: Any) -> Any:
    run = blocking if kind == "blocking" else awaited
    return run(address, lambda client: client.generate(*args, **fields), **dict(settings))


def stream(kind: str, address: str, *args: Any, **fields: Any) -> list[str]:
    async def collected(client: AsyncClient) -> list[str]:
        return [chunk.text async for chunk in client.stream(*args, **fields)]

    if kind == "blocking":
        return blocking(address, lambda c: [chunk.text for chunk in c.stream(*args, **fields)])
    return awaited(address, collected)


def call(kind: str, address: str, method: str, *args: Any, **named: Any) -> Any:
    run = blocking if kind == "blocking" else awaited
    return run(address, lambda client: getattr(client, method)(*args, **named))


both = pytest.mark.parametrize("kind", ["blocking", "asyncio"])


@both
def test_every_field_arrives(server: tuple[Scripted, str], kind: str) -> None:
    service, address = server
    asked = {
        "temperature": 0.5, "top_k": 4, "top_p": 0.5, "min_p": 0.25, "seed": 2**63, "max_tokens": 8,
        "min_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [5, 6], "ignore_eos": False,
        "logprobs": 0, "skip_special_tokens": False, "repetition_penalty": 1.5,
        "presence_penalty": -1.0, "frequency_penalty": 0.5, "logit_bias": {7: -1.5},
        "allowed_token_ids": [1, 2], "bad_words": ["x", [3, 4]], "prompt_logprobs": 1, "n": 2,
        "best_of": 3,
    }  # fmt: skip
    assert set(asked) == {f.name for f in pb.SamplingParams.DESCRIPTOR.fields}
    labels = {"request_id": "r", "priority": -2, "tenant": "t", "cache_salt": "s"}
    settings = {"api_key": "secret", "timeout": 20.0}
    extra = (("traceparent", "00-1-2-03"),)
    response = generate(
        kind, address, [1, 2, 3], settings=settings, metadata=extra, **asked, **labels
    )
    assert response.text == "".join(WORDS)
    (request,) = service.requests
    expected = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1, 2, 3]),
        sampling=pb.SamplingParams(
            **{
                **asked,
                "allowed_token_ids": pb.TokenIds(ids=[1, 2]),
                "bad_words": [
                    pb.BadWord(text="x"),
                    pb.BadWord(token_ids=pb.TokenIds(ids=[3, 4])),
                ],
            }
        ),
        **labels,
    )
    assert request == expected
    assert service.metadata["authorization"] == "Bearer secret"
    assert service.metadata["traceparent"] == "00-1-2-03"


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "a tool",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "w", "arguments": {"c": "Rome"}}},
            {"function": {"name": "w", "arguments": '{"c": "Ostia"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
]
TOOL = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}


@both
def test_a_chat_is_what_the_server_reads(server: tuple[Scripted, str], kind: str) -> None:
    service, address = server
    generate(kind, address, CHAT)
    generate(kind, address, chat(CHAT, tools=[TOOL], template="t", enable_thinking=True))
    plain, more = (prompt_of(request) for request in service.requests)
    assert isinstance(plain, Chat) and isinstance(more, Chat)
    calls = plain.messages[1]["tool_calls"]
    assert [c["function"]["arguments"] for c in calls] == [{"c": "Rome"}, {"c": "Ostia"}]
    assert plain.messages[1]["reasoning_content"] == "a tool"
    assert plain.messages[0] == CHAT[0] and plain.messages[2] == CHAT[2]
    assert not plain.template_args and more.messages == plain.messages
    assert more.template_args == {"tools": [TOOL], "template": "t", "enable_thinking": True}


@both
def test_the_other_methods(server: tuple[Scripted, str], kind: str) -> None:
    service, address = server
    response = call(kind, address, "embed", ["one", [1, 2], CHAT[:1]], tenant="t", priority=0)
    assert len(response.embeddings) == 3
    assert [i.WhichOneof("prompt") for i in service.requests[0].inputs] == [
        "text", "token_ids", "chat",
    ]  # fmt: skip
    assert service.requests[0].tenant == "t" and service.requests[0].HasField("priority")
    assert call(kind, address, "tokenize", "hello", add_special_tokens=False).token_ids == [1, 2]
    assert service.requests[1] == pb.TokenizeRequest(text="hello", add_special_tokens=False)
    assert call(kind, address, "tokenize", CHAT[:1]).token_ids == [1, 2]
    assert service.requests[2].WhichOneof("prompt") == "chat"
    assert call(kind, address, "detokenize", [1, 2], skip_special_tokens=False) == "two"
    assert service.requests[3] == pb.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=False)
    assert call(kind, address, "model_info").name == "model"
    for method, args, named, message in (
        ("embed", (["x"],), {"top_k": 1}, "top_k: no such field; there are request_id"),
        ("embed", ("abc",), {}, "inputs: got 'abc', must be a list of prompts; a single one is"),
        ("embed", ([1, 2],), {}, "inputs[0]: prompt: got 1, must be text, token ids, or messages"),
        ("embed", (["x", [1, "y"]],), {}, "inputs[1]: prompt[1]: got 'y', must be a token id, a"),
        ("embed", ([[{"role": 1}]],), {}, "inputs[0]: messages[0].role: got 1, must be a text"),
        ("embed", (CHAT[:1],), {}, "inputs[0]: prompt: got {'role': 'user', "),
        ("tokenize", ([1, 2],), {}, "prompt: got [1, 2], must be text, or messages"),
        ("tokenize", ("x",), {"return_tokens": 1}, "return_tokens: got 1, must be true or false"),
        ("detokenize", (["x"],), {}, "token_ids[0]: got 'x', must be a token id"),
        ("detokenize", (5,), {}, "token_ids: got 5, must be a list of token ids"),
        ("detokenize", ([1],), {"skip_special_tokens": None}, "skip_special_tokens: got None"),
        ("model_info", (), {"timeout": 0}, "timeout: got 0, must be a number of seconds above 0"),
        ("ready", (), {"timeout": "5"}, "timeout: got '5', must be a number of seconds"),
        ("wait_ready", (None,), {}, "timeout: got None, must be a number of seconds"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            call(kind, address, method, *args, **named)
        assert str(caught.value).startswith(message)
    service.failures = [(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")]
    with pytest.raises(Overloaded, match="full"):
        call(kind, address, "embed", ["x"])


@both
def test_what_is_left_out_is_unset(server: tuple[Scripted, str], kind: str) -> None:
    service, address = server
    assert stream(kind, address, "hello", temperature=None, stop="end") == WORDS
    (request,) = service.requests
    assert request.text == "hello" and not request.sampling.HasField("temperature")
    assert list(request.sampling.stop) == ["end"] and "authorization" not in service.metadata


@both
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1.0}, "temprature: no such field; there are request_id, "),
        ({"temperature": "hot"}, "temperature: got 'hot'"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_k": True}, "top_k: got True, must be a whole number from 0 to 4294967295"),
        ({"n": 1.5}, "n: got 1.5, must be a whole number"),
        ({"seed": 2**64}, "seed: got 18446744073709551616, must be a whole number from 0 to 1844"),
        ({"temperature": True}, "temperature: got True, must be a number"),
        ({"ignore_eos": 1}, "ignore_eos: got 1, must be true or false"),
        ({"stop": 5}, "stop: got 5, must be a text, or a list of texts"),
        ({"stop": {"a": 1}}, "stop: got {'a': 1}, must be a text, or a list of texts"),
        ({"stop": ["a", 5]}, "stop[1]: got 5, must be a text"),
        ({"stop": "\ud800"}, "stop[0]: got '\\ud800', must be a text, without lone surrogates"),
        ({"stop_token_ids": 5}, "stop_token_ids: got 5, must be a list of token ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids: got '12', must be a list of token ids"),
        ({"stop_token_ids": [1, "x"]}, "stop_token_ids[1]: got 'x', must be a token id, a whole"),
        ({"allowed_token_ids": 5}, "allowed_token_ids: got 5, must be a list of token ids"),
        ({"logit_bias": 5}, "logit_bias: got 5, must be numbers by token ids"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias: got {'a': 1.0}, must be numbers by token ids"),
        ({"bad_words": "abc"}, "bad_words: got 'abc', must be a list of texts or of lists of"),
        ({"bad_words": [5]}, "bad_words[0]: got 5, must be a text or a list of token ids"),
        ({"bad_words": ["a", [1, -1]]}, "bad_words[1][1]: got -1, must be a token id"),
        ({"bad_words": ["\ud800"]}, "bad_words[0]: got '\\ud800', must be a text"),
        ({"tenant": 3}, "tenant: got 3, must be a text"),
        ({"tenant": b"x"}, "tenant: got b'x', must be a text"),
        ({"priority": 2**31}, "priority: got 2147483648, must be a whole number from -2147483648"),
        ({"timeout": -1}, "timeout: got -1, must be a number of seconds above 0"),
        ({"timeout": float("inf")}, "timeout: got inf, must be a number of seconds above 0"),
        ({"metadata": {"a": "b"}}, "metadata: got {'a': 'b'}, must be pairs"),
        ({"metadata": ["ab"]}, "metadata[0]: got str, must be a pair of a name and its value"),
        ({"metadata": [("A", "b")]}, "metadata[0]: got 'A', must be a name of digits, lower-case"),
        ({"metadata": [("x-bin", "b")]}, "metadata[0]: got str for x-bin, must be bytes"),
        (
            {"metadata": [("a", "secret\n")]},
            "metadata[0]: got a text of 7 characters with '\\n' at 6 for a, must be printable",
        ),
    ],
)
def test_what_no_message_can_hold_is_refused(
    server: tuple[Scripted, str], kind: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate(kind, server[1], "hello", **fields)
    assert str(caught.value).startswith(message)
    assert not server[0].requests


@pytest.mark.parametrize("prompt", [None, 5, b"abc", {"role": "user"}, {1, 2}])
@both
def test_what_is_no_prompt_is_refused(server: tuple[Scripted, str], kind: str, prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate(kind, server[1], prompt)
    said = f"prompt: got {prompt!r}, must be text, token ids, or messages of a chat"
    assert str(caught.value) == said


def test_ids_come_from_whatever_has_an_order(server: tuple[Scripted, str]) -> None:
    service, address = server
    for ids in ((1, 2), np.array([1, 2]), range(1, 3), iter([1, 2])):
        generate("blocking", address, ids, stop_token_ids=np.array([3]))
    for request in service.requests:
        assert list(request.token_ids.ids) == [1, 2]
        assert list(request.sampling.stop_token_ids) == [3]
    generate("blocking", address, [], allowed_token_ids=[], bad_words=[[]])
    request = service.requests[-1]
    assert request.WhichOneof("prompt") == "token_ids"  # and not none at all
    assert request.sampling.HasField("allowed_token_ids")
    assert request.sampling.bad_words[0].WhichOneof("word") == "token_ids"


@both
def test_what_is_too_large_is_said_with_its_size(kind: str) -> None:
    """By grpc itself, with the status of a full queue."""
    service = Scripted()
    options = [("grpc.max_receive_message_length", 1000)]
    grpc_server = grpc.server(ThreadPoolExecutor(2), options=options)
    pb_grpc.add_GenerationServiceServicer_to_server(service, grpc_server)
    address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    try:
        with pytest.raises(TooLarge) as caught:
            generate(kind, address, "x" * 2000)
        error = caught.value
        assert str(error).startswith("request: got 2005 bytes, must be at most 1000, what the ser")
        assert (error.size, error.limit) == (2005, 1000)
        with pytest.raises(TooLarge) as caught:
            generate(kind, address, "x", metadata=[("a", "b" * 20_000)])
        assert str(caught.value).startswith("metadata: got 20000 bytes, must be at most 16384")
    finally:
        grpc_server.stop(None).wait()
    assert not service.requests


@pytest.mark.parametrize(
    ("details", "says", "sizes"),
    [
        (
            "Stream removed (CLIENT: Received message larger than max (9 vs. 4))",
            "answer: got 9 bytes, must be at most 4, what this client takes; a stream's messages",
            (9, 4),
        ),
        (
            "Decompressed message larger than max",
            "request or answer, unpacked: got more bytes than its receiver takes",
            (None, None),
        ),
    ],
)
@both
def test_what_else_is_too_large(
    server: tuple[Scripted, str],
    kind: str,
    details: str,
    says: str,
    sizes: tuple[int | None, int | None],
) -> None:
    service, address = server
    service.failures = [(grpc.StatusCode.RESOURCE_EXHAUSTED, details)]
    with pytest.raises(TooLarge) as caught:
        generate(kind, address, "hello")
    assert str(caught.value).startswith(says)
    assert (caught.value.size, caught.value.limit) == sizes


def make(kind: str, *args: Any, **settings: Any) -> None:
    async def run() -> None:
        await AsyncClient(*args, **settings).close()

    if kind == "blocking":
        Client(*args, **settings).close()
    else:
        asyncio.run(run())


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key": "secret\n"}, "api_key: got a text of 7 characters with '\\n' at 6, must be"),
        ({"api_key": "se cret"}, "api_key: got a text of 7 characters with ' ' at 2, must be pri"),
        ({"api_key": ""}, "api_key: got an empty text, must be printable ASCII without spaces"),
        ({"api_key": b"secret"}, "api_key: got bytes, must be printable ASCII"),
        ({"tls": "ca.pem"}, "tls: got 'ca.pem', must be True, False or quire.client.TLS"),
        ({"retry": 3}, "retry: got 3, must be quire.client.Retry"),
        ({"timeout": 0}, "timeout: got 0, must be a number of seconds above 0"),
        ({"timeout": "5"}, "timeout: got '5', must be a number of seconds above 0"),
    ],
)
def test_what_no_client_can_be_made_of(kind: str, settings: Any, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        make(kind, "localhost:1", **settings)
    assert str(caught.value).startswith(message) and "secret" not in str(caught.value)


GOOD_ADDRESSES = ["localhost:1", "[::1]:1", "unix:/x", "dns:///a:1", "dns:a:1", "ipv4:1.2.3.4:5"]
BAD_ADDRESSES = ["", "localhost", "127.0.0.1", "::1", "::1:5", "a:0", "a:65536", "a:b", 5, None]


@both
def test_addresses(kind: str) -> None:
    for address in GOOD_ADDRESSES:
        make(kind, address)
    for bad in [*BAD_ADDRESSES, "http://localhost:1", "https://localhost:1", "a b:1"]:
        with pytest.raises(InvalidConfig) as caught:
            make(kind, bad)
        assert str(caught.value).startswith(f"address: got {bad!r}, must be HOST:PORT")


@both
def test_a_key_in_plain_text_is_warned_about_where_others_can_read_it(kind: str) -> None:
    for far in (
        "10.0.0.1:1",
        "example.org:1",
        "dns:///example.org:1",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
    ):
        with pytest.warns(UserWarning, match=f"the API key goes to {far} in plain text") as caught:
            make(kind, far, api_key="secret")
        assert len(caught) == 1 and caught[0].filename == __file__
        assert "secret" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for near in ("localhost:1", "127.0.0.2:1", "[::1]:1", "unix:/x", "dns:///localhost:1"):
            make(kind, near, api_key="secret")
        make(kind, "10.0.0.1:1", api_key="secret", tls=True)
        make(kind, "10.0.0.1:1")


@pytest.mark.parametrize(
    ("messages", "more", "message"),
    [
        ("hello", {}, "messages: got 'hello', must be a list of JSON objects"),
        ({"role": "user"}, {}, "messages: got {'role': 'user'}, must be a list of JSON objects"),
        ([CHAT[0], 5], {}, "messages[1]: got 5, must be a JSON object"),
        (
            [{"role": "user", "contents": "x"}],
            {},
            "messages[0].contents: no such field; there are role, content",
        ),
        ([{"role": 1}], {}, "messages[0].role: got 1, must be a text"),
        ([{"role": "user", "content": [{}]}], {}, "messages[0].content: got [{}], must be a text"),
        ([{"role": "assistant", "tool_calls": 5}], {}, "messages[0].tool_calls: got 5, must be a"),
        (
            [{"role": "assistant", "tool_calls": ["x"]}],
            {},
            "messages[0].tool_calls[0]: got 'x', must be a JSON object",
        ),
        (CHAT, {"tools": TOOL}, "tools: got {'type'"),
        (CHAT, {"tools": "x"}, "tools: got 'x', must be a list of JSON objects"),
        (CHAT, {"documents": ["x"]}, "documents[0]: got 'x', must be a JSON object"),
        (CHAT, {"template": 5}, "template: got 5, must be a text"),
        (CHAT, {"add_generation_prompt": "no"}, "add_generation_prompt: got 'no', must be true"),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            {},
            "messages[0].tool_calls[0]: got {}, must",
        ),
        (CHAT, {"tools": [{"a": object()}]}, "tools[0]: got {'a'"),
        (CHAT, {"temperature": float("nan")}, "template_args: got {'temperature': nan}, must be"),
    ],
)
def test_what_no_chat_can_hold_is_refused(messages: Any, more: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(messages, **more)
    assert str(caught.value).startswith(message)


@both
@pytest.mark.parametrize("how", [generate, stream])
def test_unavailable_is_tried_again(server: tuple[Scripted, str], kind: str, how: Any) -> None:
    service, address = server
    service.failures = [(grpc.StatusCode.UNAVAILABLE, "starting")] * 4
    how(kind, address, "hello")
    assert len(service.requests) == 5
    service.failures = [(grpc.StatusCode.UNAVAILABLE, "still starting")] * 5
    with pytest.raises(Unavailable, match="still starting"):
        how(kind, address, "hello")
    assert len(service.requests) == 10


@both
@pytest.mark.parametrize("how", [generate, stream])
def test_so_are_long_prompts(server: tuple[Scripted, str], kind: str, how: Any) -> None:
    """grpc by itself makes calls again up to 256 KiB, and gives up silently on larger ones."""
    service, address = server
    service.failures = [(grpc.StatusCode.UNAVAILABLE, "starting")] * 2
    how(kind, address, "x" * 1_000_000)
    assert len(service.requests) == 3


@both
def test_nothing_is_tried_again_where_told(server: tuple[Scripted, str], kind: str) -> None:
    service, address = server
    service.failures = [(grpc.StatusCode.UNAVAILABLE, "starting")]
    with pytest.raises(Unavailable):
        generate(kind, address, "hello", settings={"retry": Retry(attempts=1)})
    assert len(service.requests) == 1


@both
def test_an_answer_that_began_is_not_asked_for_twice(
    server: tuple[Scripted, str], kind: str
) -> None:
    service, address = server
    service.after_words = (grpc.StatusCode.UNAVAILABLE, "the engine died")
    with pytest.raises(Unavailable, match="the engine died"):
        stream(kind, address, "hello")
    assert len(service.requests) == 1


@both
@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.INTERNAL, Internal),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.DATA_LOSS, QuireError),
    ],
)
def test_errors_are_those_of_quire(
    server: tuple[Scripted, str], kind: str, code: grpc.StatusCode, error: type[QuireError]
) -> None:
    service, address = server
    service.failures = [(code, "because")] * 2
    service.trailing = (("retry-after", "2.5"),)
    for how in (generate, stream):
        with pytest.raises(error, match="because") as caught:
            how(kind, address, "hello")
        assert type(caught.value) is error and isinstance(caught.value.__cause__, grpc.RpcError)
        assert getattr(caught.value, "retry_after", 2.5) == 2.5
    assert len(service.requests) == 2  # none of these is tried again


@both
def test_a_timeout_ends_the_call(server: tuple[Scripted, str], kind: str) -> None:
    server[0].endless = True
    with pytest.raises(DeadlineExceeded):
        stream(kind, server[1], "hello", timeout=0.3)


def test_leaving_a_stream_ends_the_request(server: tuple[Scripted, str]) -> None:
    service, address = server
    service.endless = True

    def leave(client: Client) -> None:
        with client.stream("hello") as chunks:
            assert next(chunks).text == WORDS[0]
        assert service.ended.wait(10)

    async def leave_async(client: AsyncClient) -> None:
        async with client.stream("hello") as chunks:
            assert (await anext(chunks)).text == WORDS[0]
        assert await asyncio.to_thread(service.ended.wait, 10)

    blocking(address, leave)
    awaited(address, leave_async)


def test_a_stream_closed_under_its_reader_is_an_error(server: tuple[Scripted, str]) -> None:
    """And no cancellation: nobody cancelled the task that reads, and a group would say nothing."""
    server[0].endless = True

    async def read(client: AsyncClient, close: Callable[[Any], Any]) -> None:
        stream = client.stream("hello")
        assert (await anext(stream)).text == WORDS[0]
        asyncio.get_running_loop().call_later(0.1, close, stream)
        with pytest.raises(QuireError, match="CANCELLED: the stream or its client was closed"):
            async for _ in stream:
                pass

    awaited(server[1], lambda client: read(client, lambda stream: stream.close()))
    awaited(
        server[1],
        lambda client: read(client, lambda _: asyncio.ensure_future(client.close())),
    )


@both
@pytest.mark.parametrize(
    ("method", "args"),
    [("generate", ["hello"]), ("model_info", []), ("ready", []), ("wait_ready", [5.0])],
)
def test_a_closed_client_says_so(kind: str, method: str, args: list[Any]) -> None:
    """grpc raises ValueError here, and an error without a public name there."""

    def work(client: Client) -> None:
        client.close()
        getattr(client, method)(*args)

    async def work_async(client: AsyncClient) -> None:
        await client.close()
        await getattr(client, method)(*args)

    with pytest.raises(QuireError, match="client: it was closed"):
        if kind == "blocking":
            blocking("127.0.0.1:1", work)
        else:
            awaited("127.0.0.1:1", work_async)


@pytest.mark.parametrize(
    ("method", "args"), [("model_info", ()), ("ready", ()), ("wait_ready", (60,))]
)
def test_a_client_that_is_closed_cancels_nobody(method: str, args: tuple[float, ...]) -> None:
    """grpc.aio would: the task that waits for a server which says nothing."""

    async def run(client: AsyncClient) -> None:
        waiting = asyncio.create_task(getattr(client, method)(*args))
        await asyncio.sleep(0)  # until it asks
        await client.close()
        await asyncio.wait({waiting})
        assert not waiting.cancelled()
        with pytest.raises(QuireError, match="closed"):
            await waiting

    with socket.create_server(("127.0.0.1", 0)) as silent:
        awaited(f"127.0.0.1:{silent.getsockname()[1]}", run)


def test_a_reader_that_is_cancelled_stays_so(server: tuple[Scripted, str]) -> None:
    server[0].endless = True

    async def run(client: AsyncClient) -> None:
        async def read() -> None:
            async for _ in client.stream("hello"):
                pass

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await read()
        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    awaited(server[1], run)


@both
def test_a_wait_in_vain_says_what_it_saw(server: tuple[Scripted, str], kind: str) -> None:
    """Who waited ten minutes for a server that starts learns something else than who had its
    address, or whose certificate, wrong."""
    with pytest.raises(DeadlineExceeded, match=r"not ready within 1 s \(UNIMPLEMENTED: "):
        call(kind, server[1], "wait_ready", 1.0)
    with pytest.raises(DeadlineExceeded, match=r"not ready within 1 s \(UNAVAILABLE: failed to c"):
        call(kind, "127.0.0.1:1", "wait_ready", 1.0)
    with (
        health_says(health_pb2.HealthCheckResponse.NOT_SERVING) as address,
        pytest.raises(DeadlineExceeded, match=r"not ready .* \(it says NOT_SERVING\)"),
    ):
        call(kind, address, "wait_ready", 1.0)


def test_the_look_that_the_end_of_a_wait_cuts_short_hides_nothing() -> None:
    wait = Wait("HOST:1", 0.01)
    wait.saw("it says NOT_SERVING")
    time.sleep(0.02)
    wait.saw("DEADLINE_EXCEEDED: Deadline Exceeded")
    with pytest.raises(DeadlineExceeded, match=r"\(it says NOT_SERVING\)"):
        wait.next_look()
    only = Wait("HOST:1", 0.01)
    time.sleep(0.02)
    only.saw("DEADLINE_EXCEEDED: Deadline Exceeded")
    with pytest.raises(DeadlineExceeded, match=r"\(DEADLINE_EXCEEDED: "):
        only.next_look()
    latest = Wait("HOST:1", 600.0)
    latest.saw("UNAVAILABLE: starting")
    latest.saw("it says NOT_SERVING")
    assert latest._why_not == "it says NOT_SERVING"


def test_a_server_that_is_not_there(server: tuple[Scripted, str]) -> None:
    """The scripted one has no health service."""
    assert not blocking(server[1], lambda client: client.ready())
    with pytest.raises(DeadlineExceeded, match=r"not ready within 0\.1 s"):
        awaited(server[1], lambda client: client.wait_ready(0.1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attempts": 6}, "attempts: got 6, must be a whole number from 1 to 5"),
        ({"attempts": 2.5}, "attempts: got 2.5, must be a whole number from 1 to 5"),
        ({"attempts": "3"}, "attempts: got '3', must be a whole number from 1 to 5"),
        ({"first": 0}, "first: got 0, must be a number from 0.001 to"),
        ({"first": "x"}, "first: got 'x', must be a number from 0.001 to"),
        ({"longest": float("inf")}, "longest: got inf, must be a number from 0.001 to"),
        ({"factor": float("nan")}, "factor: got nan, must be a number from 0.001 to"),
    ],
)
def test_what_no_retry_can_be(settings: Any, message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        Retry(**settings)
    assert str(caught.value).startswith(message)


def test_files_of_tls_are_looked_at(tmp_path: Any) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    for tls, says in (
        (TLS(ca=tmp_path / "none.pem"), r"ca: got .*must be a readable file"),
        (TLS(ca=5), "ca: got 5, must be a readable file"),  # type: ignore[arg-type]
        (TLS(ca=junk), r"ca: got '.*junk.pem', must hold PEM certificates"),
        (TLS(cert=junk, key=junk), r"cert, key: got '.*junk.pem' and .*, must be a PEM certif"),
        (TLS(cert=tmp_path / "none.pem"), "key: got none, must be given"),
    ):
        with pytest.raises(InvalidConfig, match=says):
            Client("localhost:1", tls=tls)


def test_the_clients_are_quires() -> None:
    assert quire.Client is Client and quire.AsyncClient is AsyncClient
