"""A client process of `quire bench frontend`; not for people.

    python -P -m quire.tools.bench.frontend_client ADDRESS STREAMS TOKENS VOCAB BEGIN END

Opens its streams at once, on one connection, reads messages, and looks at what came between BEGIN
and END (seconds of time.monotonic). Prints one JSON object.

It shares cores with what is measured, so it does as little as it can. grpc's own client takes about
as long over a message as the frontend does: this one speaks the little of gRPC over HTTP/2 that
such a stream needs. A message is there when its last byte was read from the socket.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from collections import Counter
from typing import cast

import uvloop

from ...protos.v1 import generation_pb2 as pb
from ...serving.collector import quiet_collector
from .paced_engine import Clock

# Frames of HTTP/2 (RFC 9113): kinds and flags.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4

_FRAME = struct.Struct(">BHBBI")  # length in two parts, kind, flags, stream
_MESSAGE = struct.Struct(">BI")  # of gRPC: whether it is compressed, length

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_INITIAL_WINDOW_SIZE = 4
_WINDOW = 2**31 - 1
"""Bytes that the server may send before it hears of us, on a stream and on the connection: all."""


class Stream:
    """One answer, as far as it came."""

    def __init__(self, vocab: int) -> None:
        self.clock = Clock(vocab)
        self.rest = b""  # the beginning of a message
        self.tokens = 0


class Connection(asyncio.Protocol):
    """Asks for answers and reads them.

    Args:
      request: one for each answer.
      tokens: that each answer has.
      begin, end: what comes between is counted, time.monotonic().

    Attributes:
      messages, tokens: how many were counted.
      delays: milliseconds since a token was made, and how often.
      ended: when all answers did, or with the error that kept one from it.
    """

    def __init__(
        self, streams: int, request: bytes, tokens: int, vocab: int, begin: float, end: float
    ) -> None:
        self._request, self._wanted, self._begin, self._end = request, tokens, begin, end
        self._streams = {1 + 2 * at: Stream(vocab) for at in range(streams)}  # by HTTP/2's number
        self._rest = b""  # the beginning of a frame
        self.messages = self.tokens = 0
        self.delays: Counter[int] = Counter()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(_PREFACE)
        self._send(_SETTINGS, struct.pack(">HI", _INITIAL_WINDOW_SIZE, _WINDOW))
        self._send(_WINDOW_UPDATE, struct.pack(">I", _WINDOW - 65_535))
        message = _MESSAGE.pack(0, len(self._request)) + self._request
        for number in self._streams:
            self._send(_HEADERS, _headers(), _END_HEADERS, number)
            self._send(_DATA, message, _END_STREAM, number)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost: {exc}")

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        data, at = self._rest + data, 0
        while len(data) >= at + _FRAME.size:
            high, low, kind, flags, number = _FRAME.unpack_from(data, at)
            begin, end = at + _FRAME.size, at + _FRAME.size + (high << 16) + low
            if len(data) < end:
                break
            self._frame(kind, flags, number, data[begin:end], now)
            at = end
        self._rest = data[at:]

    def _frame(self, kind: int, flags: int, number: int, payload: bytes, now: float) -> None:
        if kind == _DATA:
            self._read(self._streams[number], payload, now)
        elif kind == _HEADERS and flags & _END_STREAM:
            got = self._streams.pop(number).tokens
            if got != self._wanted:
                self._fail(f"a stream ended after {got} of {self._wanted} tokens")
            elif not self._streams and not self.ended.done():
                self.ended.set_result(None)
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._send(kind, payload if kind == _PING else b"", _ACK)
        elif kind in (_RST_STREAM, _GOAWAY):
            self._fail(f"the server sent a frame of kind {kind}: {payload!r}")

    def _read(self, stream: Stream, payload: bytes, now: float) -> None:
        payload, at = stream.rest + payload, 0
        while len(payload) >= at + _MESSAGE.size:
            end = at + _MESSAGE.size + _MESSAGE.unpack_from(payload, at)[1]
            if len(payload) < end:
                break
            tokens = pb.GenerateChunk.FromString(payload[at + _MESSAGE.size : end]).token_ids
            ages = [stream.clock.age(token, now) for token in tokens]
            stream.tokens += len(ages)
            if self._begin <= now < self._end:
                self.messages += 1
                self.tokens += len(ages)
                self.delays.update(ages)
            at = end
        stream.rest = payload[at:]

    def _send(self, kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> None:
        self._transport.write(_FRAME.pack(0, len(payload), kind, flags, stream) + payload)

    def _fail(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(why))


def _headers() -> bytes:
    """Of a request, in HPACK's simplest spelling (RFC 7541): nothing indexed that is not static."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    post, http, path, authority, named = b"\x83", b"\x86", b"\x04", b"\x01", b"\x00"
    return b"".join(
        (
            post + http,
            path + text("/quire.v1.GenerationService/StreamGenerate"),
            authority + text("localhost"),
            named + text("content-type") + text("application/grpc"),
            named + text("te") + text("trailers"),
        )
    )


async def main(
    address: str, streams: int, tokens: int, vocab: int, begin: float, end: float
) -> None:
    """Runs the streams to their end."""
    request = pb.GenerateRequest(
        text="Say something.",
        sampling=pb.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens),
    ).SerializeToString()
    host, _, port = address.rpartition(":")
    quiet_collector()
    transport, seen = await asyncio.get_running_loop().create_connection(
        lambda: Connection(streams, request, tokens, vocab, begin, end), host, int(port)
    )
    await seen.ended
    transport.abort()
    said = {"messages": seen.messages, "tokens": seen.tokens, "delays": dict(seen.delays)}
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    where, *numbers = sys.argv[1:]
    first, second, third = map(int, numbers[:3])
    uvloop.run(main(where, first, second, third, *map(float, numbers[3:])))
