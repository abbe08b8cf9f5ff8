"""Two frontends on one engine: what holds across them."""

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


async def another(served: Running) -> Server:
    server = Server(ServerConfig(port=0))
    await server.bind()
    link = await RemoteLink.attach(served.engine_address)
    await server.serve(link, served.parts.intake)
    return server


@pytest.fixture(scope="module")
def other(served: Running) -> Iterator[pb_grpc.GenerationServiceStub]:
    """Of the second frontend of the engine that `served` has."""

    server = served.run(lambda: another(served))
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.GenerationServiceStub(channel)
    served.run(server.stop)


def ask(name: str, tenant: str = "", **sampling: Any) -> pb.GenerateRequest:
    given = pb.SamplingParams(temperature=0.0, ignore_eos=True, **sampling)
    return pb.GenerateRequest(text="the fox", request_id=name, tenant=tenant, sampling=given)


def embed(name: str, count: int) -> pb.EmbedRequest:
    return pb.EmbedRequest(inputs=[pb.EmbedInput(text="a fox")] * count, request_id=name)


def test_a_name_in_use_is_refused_wherever_it_arrives(
    served: Running, other: pb_grpc.GenerationServiceStub
) -> None:
    with held(served.parts) as go:
        stream = served.stub.StreamGenerate(ask("a/b"), timeout=60)
        eventually(lambda: served.engine.stats().running == 1)
        for call, request in (
            (other.Generate, ask("a/b", max_tokens=4)),
            (other.Embed, embed("a/b", 3)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, timeout=60)
            assert caught.value.code() is StatusCode.INVALID_ARGUMENT
            says = "request_id: got 'a/b', must be unlike that of every unfinished request"
            assert caught.value.details() == says
        calls = [
            other.Generate.future(request, timeout=60)
            for request in (
                ask("a/b", "tenant", max_tokens=4),
                ask("a", max_tokens=4),
                ask("", max_tokens=4),
            )
        ]
        stream.cancel()
        # Its call is over, whatever the engine is at.
        eventually(lambda: ("", "a/b") not in served.host._names._held)
        go.set()
        for call in calls:
            call.result()
    at_rest(served.engine)
    assert other.Generate(ask("a/b", max_tokens=4), timeout=60).request_id == "a/b"


def test_a_name_is_free_again_when_its_call_has_ended(
    served: Running, other: pb_grpc.GenerationServiceStub
) -> None:
    request = ask("again", stop=["a", "e", "o"], max_tokens=200)
    first = served.stub.Generate(request, timeout=60)
    for _ in range(10):
        for stub in (other, served.stub):
            assert stub.Generate(request, timeout=60).text == first.text
            assert len(stub.Embed(embed("again", 5), timeout=60).embeddings) == 5
    at_rest(served.engine)


def test_a_frontend_that_goes_leaves_no_name_behind(served: Running) -> None:
    names = served.host._names
    with held(served.parts) as go:
        server = served.run(lambda: another(served))
        with grpc.insecure_channel(server.address) as channel:
            call = pb_grpc.GenerationServiceStub(channel).Generate.future(ask("left"), timeout=60)
            eventually(lambda: ("", "left") in names._held)
            served.run(server.stop)
            assert call.exception().code() is StatusCode.UNAVAILABLE
        eventually(lambda: not names._held)
        go.set()
    at_rest(served.engine)
    assert not names._keys
