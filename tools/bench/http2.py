"""The little of gRPC over HTTP/2 that a caller of streams needs, for callers that share a machine
with what they measure: grpc's own client takes several times as long over a message, and half a
millisecond and more from the socket to whoever waits for the first one.

Used by frontend_client.py, and by targets.py for the callers of `quire bench online`. For Quire's
own servers, over plain TCP: what a proxy may send besides (headers in Huffman's code, headers in
several frames) is not read.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Iterator
from typing import cast
from urllib.parse import unquote

# Frames of HTTP/2 (RFC 9113): kinds and flags.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 1
_END_HEADERS, _PADDED, _PRIORITY = 4, 8, 32
_HEADER_TABLE_SIZE, _INITIAL_WINDOW_SIZE = 1, 4

_FRAME = struct.Struct(">BHBBI")  # length in two parts, kind, flags, stream
_SETTING = struct.Struct(">HI")
_NUMBER = struct.Struct(">I")
_MESSAGE = struct.Struct(">BI")  # of gRPC: whether it is compressed, length

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WINDOW = 2**31 - 1
"""Bytes that the server may send before it hears of us, on a stream and on the connection: all."""
_FIRST_WINDOW = 65_535
"""Bytes that either end may send before the other says otherwise."""
_LONGEST_FRAME = 16_384
"""Bytes of data that every receiver takes in one frame."""


class Streams(asyncio.Protocol):
    """One connection, and the calls on it; each sends one message and gets any number. What comes
    of them is told by `came`, `over` and `lost`, which are for subclasses."""

    def __init__(self) -> None:
        self._number = -1
        self._rest = b""  # the beginning of a frame
        self._parts: dict[int, bytes] = {}  # of each open call, the beginning of a message
        self._unsent: deque[tuple[int, bytes]] = deque()  # for which there was no room
        self._room = self._first_room = _FIRST_WINDOW  # bytes that the connection may send
        self._rooms: dict[int, int] = {}  # that each open call may

    def came(self, number: int, message: bytes) -> None:
        """A message of a call, whose last byte was just read from the socket."""

    def over(self, number: int, headers: dict[str, str]) -> None:
        """A call has ended; its trailers, such as grpc-status, which is missing where the server
        broke it off."""

    def lost(self, why: str) -> None:
        """The connection is of no more use, and no call on it ends. May come more than once."""

    def call(self, path: str, message: bytes) -> int:
        """Asks for a stream; its number."""
        self._number = number = self._number + 2
        self._parts[number], self._rooms[number] = b"", self._first_room
        self._send(_HEADERS, _request_headers(path), _END_HEADERS, number)
        self._unsent.append((number, _MESSAGE.pack(0, len(message)) + message))
        self._send_data()
        return number

    def cancel(self, number: int) -> None:
        """Ends a call early; nothing more is told of it."""
        if self._forget(number):
            self._send(_RST_STREAM, _NUMBER.pack(8), 0, number)

    def _forget(self, number: int) -> bool:
        """Drops what there is of a call, its message too, if that is not sent whole; whether it was
        open."""
        if self._parts.pop(number, None) is None:
            return False
        del self._rooms[number]
        self._unsent = deque(each for each in self._unsent if each[0] != number)
        return True

    # ---- asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(_PREFACE)
        # Of headers nothing is to be remembered: then all that matters is spelt out.
        settings = (_HEADER_TABLE_SIZE, 0), (_INITIAL_WINDOW_SIZE, _WINDOW)
        self._send(_SETTINGS, b"".join(_SETTING.pack(*each) for each in settings))
        self._send(_WINDOW_UPDATE, _NUMBER.pack(_WINDOW - _FIRST_WINDOW))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost(f"the connection was lost: {exc}")

    def data_received(self, data: bytes) -> None:
        data, at = self._rest + data, 0
        while len(data) >= at + _FRAME.size:
            high, low, kind, flags, number = _FRAME.unpack_from(data, at)
            begin, end = at + _FRAME.size, at + _FRAME.size + (high << 16) + low
            if len(data) < end:
                break
            self._frame(kind, flags, number, data[begin:end])
            at = end
        self._rest = data[at:]

    # ---- frames

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == _DATA:
            if number in self._parts:  # else it was cancelled
                self._read(number, payload)
        elif kind == _HEADERS:
            if flags & _END_STREAM and self._forget(number):
                plain = flags & _END_HEADERS and not flags & (_PADDED | _PRIORITY)
                self.over(number, read_headers(payload) if plain else {})
        elif kind == _SETTINGS:
            if not flags & _ACK:
                self._settle(payload)
                self._send(_SETTINGS, b"", _ACK)
        elif kind == _PING:
            if not flags & _ACK:
                self._send(_PING, payload, _ACK)
        elif kind == _WINDOW_UPDATE:
            more = _NUMBER.unpack(payload)[0]
            if not number:
                self._room += more
            elif number in self._rooms:
                self._rooms[number] += more
            self._send_data()
        elif kind == _RST_STREAM:
            if self._forget(number):
                code = _NUMBER.unpack(payload)[0]
                self.over(number, {"grpc-message": f"the server reset the stream ({code})"})
        elif kind == _GOAWAY:
            self.lost(f"the server sends its callers away: {payload!r}")

    def _read(self, number: int, payload: bytes) -> None:
        payload, at = self._parts[number] + payload, 0
        while len(payload) >= at + _MESSAGE.size:
            packed, size = _MESSAGE.unpack_from(payload, at)
            if len(payload) < (end := at + _MESSAGE.size + size):
                break
            if packed:
                self.lost("the server sent a compressed message, which nobody asked for")
            self.came(number, payload[at + _MESSAGE.size : end])
            at = end
        if number in self._parts:  # else whoever got the message has left
            self._parts[number] = payload[at:]

    def _settle(self, payload: bytes) -> None:
        """What the server says of itself."""
        for name, value in _SETTING.iter_unpack(payload):
            if name == _INITIAL_WINDOW_SIZE:
                more, self._first_room = value - self._first_room, value
                self._rooms = {number: room + more for number, room in self._rooms.items()}
        self._send_data()

    def _send_data(self) -> None:
        """As much of what is unsent as there is room for, in order; a call that has none keeps no
        other from sending."""
        left: deque[tuple[int, bytes]] = deque()
        while self._unsent and self._room > 0:
            number, data = self._unsent.popleft()
            while (
                data
                and (size := min(_LONGEST_FRAME, len(data), self._room, self._rooms[number])) > 0
            ):
                self._room -= size
                self._rooms[number] -= size
                self._send(_DATA, data[:size], _END_STREAM * (size == len(data)), number)
                data = data[size:]
            if data:
                left.append((number, data))
        self._unsent.extendleft(reversed(left))

    def _send(self, kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> None:
        self._transport.write(_FRAME.pack(0, len(payload), kind, flags, stream) + payload)


def _request_headers(path: str) -> bytes:
    """In HPACK's simplest spelling (RFC 7541): nothing indexed that is not static."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    post, http, path_is, authority, named = b"\x83", b"\x86", b"\x04", b"\x01", b"\x00"
    return b"".join(
        (
            post + http,
            path_is + text(path),
            authority + text("localhost"),
            named + text("content-type") + text("application/grpc"),
            named + text("te") + text("trailers"),
        )
    )


def read_headers(block: bytes) -> dict[str, str]:
    """The headers that HPACK spells out, from a sender that was told to remember none; of those
    that it says by number, which are HTTP's own, there is none that a call needs.

    grpc-message is as gRPC spells it, percent-encoded, and here as it was meant.
    """
    found: dict[str, str] = {}
    for name, value in _literals(block):
        found[name] = unquote(value) if name == "grpc-message" else value
    return found


def _literals(block: bytes) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:  # name and value by number
            _, at = _integer(block, at, 7)
        elif first & 0xE0 == 0x20:  # how much is remembered
            _, at = _integer(block, at, 5)
        else:
            number, at = _integer(block, at, 6 if first & 0x40 else 4)
            name, at = ("", at) if number else _text(block, at)
            value, at = _text(block, at)
            if name:
                yield name, value


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """A number whose first `bits` bits end a byte; and where it ends."""
    most = (1 << bits) - 1
    value, at = block[at] & most, at + 1
    if value < most:
        return value, at
    shift = 0
    while True:
        value += (block[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not block[at - 1] & 0x80:
            return value, at


def _text(block: bytes, at: int) -> tuple[str, int]:
    """A text, empty where it is in Huffman's code; and where it ends."""
    in_code = block[at] & 0x80
    size, at = _integer(block, at, 7)
    end = at + size
    return "" if in_code else block[at:end].decode("latin-1"), end
