"""A server that vanished without a word: no end of the connection, and no answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from quire.client import AsyncClient, Client, Retry, channel
from quire.client.channel import AS_USUAL, Connection
from quire.errors import InvalidConfig, Unavailable
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc

PATIENCE = 30.0
"""Seconds until a call that nothing else ends is DEADLINE_EXCEEDED, and the test fails."""

LOOKS = 0.1
"""Seconds between looks at the server."""

ENOUGH = 1.0
"""Seconds in which a server that is there surely answers, on a machine that does much else."""


class Silent(pb_grpc.GenerationServiceServicer):
    """Says a word at most, and then nothing until it is let go."""

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()

    def Generate(self, request: Any, context: Any) -> pb.GenerateResponse:
        self.asked.set()
        self.go.wait(PATIENCE)
        return pb.GenerateResponse()

    def StreamGenerate(self, request: Any, context: Any) -> Iterator[pb.GenerateChunk]:
        yield pb.GenerateChunk(text="one")
        self.go.wait(PATIENCE)


class Way:
    """Carries connections to a server, until it is cut: then it takes them, and carries nothing.

    Attributes:
      answered: the server has said so many things since its first; looks at it, mostly.
    """

    def __init__(self, port: int):
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._cut = threading.Event()
        self.answered = threading.Semaphore(0)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            self._ends.append(near)
            if self._cut.is_set():
                continue
            far = socket.create_connection(("127.0.0.1", self._port))
            self._ends.append(far)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(*ends, far), daemon=True).start()

    def _carry(self, source: socket.socket, to: socket.socket, far: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self._cut.is_set():
                    return
                to.sendall(data)
                if source is far:
                    self.answered.release()
        except OSError:
            pass

    def cut(self) -> None:
        self._cut.set()

    def close(self) -> None:
        for each in (self._listening, *self._ends):
            each.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    yield (silent := Silent())
    silent.go.set()


@pytest.fixture
def way(silent: Silent, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """To a server that allows as many looks as the clients then take."""
    for name, seconds in (("ANSWER_WITHIN", ENOUGH), ("CONNECT_WITHIN", ENOUGH)):
        monkeypatch.setattr(channel, name, seconds)
    monkeypatch.setattr(channel, "_LOOKS_AT_LEAST", LOOKS)
    server = grpc.server(
        ThreadPoolExecutor(4), options=[("grpc.http2.min_ping_interval_without_data_ms", 1)]
    )
    pb_grpc.add_GenerationServiceServicer_to_server(silent, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield (way := Way(port))
    silent.go.set()
    way.close()
    server.stop(None).wait()


def test_a_stream_that_was_silent_for_long_is_given_up(way: Way) -> None:
    """After more looks than grpc itself takes where the client sends nothing."""
    with (
        Client(way.address, look_after=LOOKS) as client,
        client.stream("hi", timeout=PATIENCE) as stream,
    ):
        assert next(stream).text == "one"
        for _ in range(6):
            assert way.answered.acquire(timeout=PATIENCE), "it is looked at no more"
        way.cut()
        with pytest.raises(Unavailable):
            next(stream)


def test_a_call_is_given_up_once_it_was_tried_again(way: Way, silent: Silent) -> None:
    retry = Retry(attempts=2, first=0.01, longest=0.01)
    with (
        Client(way.address, retry=retry, look_after=LOOKS) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        # Less than what grpc by itself lets a new connection take.
        call = pool.submit(client.generate, "hi", timeout=15)
        assert silent.asked.wait(PATIENCE)
        way.cut()
        with pytest.raises(Unavailable):
            call.result()


def test_of_the_asynchronous_client_too(way: Way) -> None:
    async def work() -> None:
        async with AsyncClient(way.address, look_after=LOOKS) as client:
            stream = client.stream("hi", timeout=PATIENCE)
            assert (await anext(stream)).text == "one"
            way.cut()
            with pytest.raises(Unavailable):
                await anext(stream)

    asyncio.run(work())


def test_within_half_a_minute() -> None:
    assert channel.LOOK_AFTER + channel.ANSWER_WITHIN <= 30


@pytest.mark.parametrize("look_after", [0.5, 0, "soon", float("inf")])
def test_looks_that_are_refused(look_after: Any) -> None:
    with pytest.raises(
        InvalidConfig, match=r"look_after: got .*, must be a number of seconds from 1"
    ):
        Client("127.0.0.1:1", look_after=look_after)


def test_who_does_not_want_to_look_does_not() -> None:
    names = {name for name, _ in Connection("h:1", None, False, None, AS_USUAL, None).options}
    assert not any("keepalive" in name or "ping" in name for name in names)
