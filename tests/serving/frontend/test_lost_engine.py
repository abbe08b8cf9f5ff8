"""Calls that run when their frontend loses its engine: each ends, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from engines import at_rest, eventually, held
from grpc import StatusCode
from running import Running

from quire.config import ServerConfig
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.serving.frontend.remote_link import RemoteLink
from quire.serving.frontend.server import Server
from quire.serving.intake import Intake

TEXT = pb.EmbedInput(text="the quick brown fox")
INPUTS = 200  # more than are in the engine at once


@pytest.fixture
def losing(served: Running) -> Iterator[tuple[Server, RemoteLink, Any]]:
    """A second frontend of an engine, which is the one to lose it."""

    async def begin() -> tuple[Server, RemoteLink]:
        server = Server(ServerConfig(port=0))
        await server.bind()
        link = await RemoteLink.attach(served.engine_address)
        await server.serve(link, served.parts.intake)
        return server, link

    server, link = served.run(begin)
    with grpc.insecure_channel(server.address) as channel:
        yield server, link, pb_grpc.GenerationServiceStub(channel)
    served.run(server.stop)


def lose(served: Running, link: RemoteLink) -> None:
    served.loop.call_soon_threadsafe(link._stream.abort)


def test_embeddings_that_are_under_way_or_wait_for_room(
    served: Running, losing: tuple[Server, RemoteLink, Any]
) -> None:
    server, link, stub = losing
    with held(served.parts) as go:
        call = stub.Embed.future(pb.EmbedRequest(inputs=[TEXT] * INPUTS), timeout=60)
        eventually(lambda: len(link._open) > 100)
        lose(served, link)
        assert call.exception().code() is StatusCode.UNAVAILABLE
        assert "the engine is gone" in call.exception().details()
        go.set()
    eventually(lambda: not link._open and not server._service.calls.running)
    at_rest(served.engine)
    eventually(lambda: not served.host._routes)


def test_texts_that_are_read_need_no_engine(
    served: Running, losing: tuple[Server, RemoteLink, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked of it when they have been read is UNAVAILABLE."""
    server, link, stub = losing
    read, sound = [], Intake.encode
    tokens_of = Intake.tokens_of

    def encode(self: Intake, *args: Any, **how: Any) -> Any:
        read.append(1)
        eventually(lambda: not link.healthy)
        return sound(self, *args, **how)

    def prompt(self: Intake, *args: Any, **how: Any) -> Any:
        read.append(1)
        eventually(lambda: not link.healthy)
        return tokens_of(self, *args, **how)

    monkeypatch.setattr(Intake, "encode", encode)
    monkeypatch.setattr(Intake, "tokens_of", prompt)
    text = "a fox " * 4_000  # long enough for another thread
    tokenizing = stub.Tokenize.future(pb.TokenizeRequest(text=text), timeout=60)
    embedding = stub.Embed.future(pb.EmbedRequest(inputs=[TEXT]), timeout=60)
    eventually(lambda: len(read) == 2)
    lose(served, link)
    assert tokenizing.result().token_ids
    assert embedding.exception().code() is StatusCode.UNAVAILABLE
    eventually(lambda: not server._service.calls.running)
    assert not link._open and not link._handles
