"""What a client of `quire bench frontend` makes of the bytes that a server sends."""

from __future__ import annotations

import asyncio
import struct
import time

import pytest

from quire.protos.v1 import generation_pb2 as pb
from quire.tools.bench.frontend_client import Connection
from quire.tools.bench.paced_engine import stamp

VOCAB = 2048
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">IBBI", len(payload), kind, flags, stream)[1:] + payload


def message(*tokens: int) -> bytes:
    said = pb.GenerateChunk(text="x", token_ids=tokens).SerializeToString()
    return struct.pack(">BI", 0, len(said)) + said


class Wire(asyncio.Transport):
    """Takes what a client sends."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data


async def opened(tokens: int) -> tuple[Connection, Wire]:
    wire = Wire()
    connection = Connection(2, b"ask", tokens, VOCAB, 0.0, float("inf"))
    connection.connection_made(wire)
    return connection, wire


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_messages_are_read_however_they_are_cut(size: int) -> None:
    async def main() -> None:
        connection, wire = await opened(3)
        assert wire.sent.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert wire.sent.count(b"ask") == 2
        wire.sent = b""
        token = stamp(VOCAB, time.monotonic() - 0.05)
        first, second = message(token, token), message(token)
        answer = (first + second)[:9], (first + second)[9:]  # in two frames
        data = frame(SETTINGS) + frame(PING, b"12345678")
        for stream in (1, 3):
            data += b"".join(frame(DATA, part, stream=stream) for part in answer)
        data += b"".join(frame(HEADERS, b"", 5, stream) for stream in (1, 3))
        for at in range(0, len(data), size):
            assert not connection.ended.done()
            connection.data_received(data[at : at + size])
        connection.ended.result()
        assert wire.sent == frame(SETTINGS, b"", 1) + frame(PING, b"12345678", 1)
        assert (connection.messages, connection.tokens) == (4, 6)
        assert connection.delays.total() == 6 and min(connection.delays) >= 49

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (frame(DATA, message(300, 301), 0, 1) + frame(HEADERS, b"", 5, 1), "after 2 of 3 tokens"),
        (frame(RST_STREAM, b"\0\0\0\7", 0, 1), "after 0 of 3 tokens"),
        (frame(GOAWAY, bytes(8)), "sends its callers away"),
    ],
)
def test_an_answer_that_is_cut_short_is_no_answer(data: bytes, says: str) -> None:
    async def main() -> None:
        connection, _ = await opened(3)
        connection.data_received(data)
        with pytest.raises(ConnectionError, match=says):
            await connection.ended

    asyncio.run(main())
