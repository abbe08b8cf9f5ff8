"""Connections on which nothing is said, by a client of HTTP/2 that does as little as one can."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from frontends import Frontend

from quire.client import channel
from quire.serving.frontend import transport

PING, GOAWAY, SETTINGS = 6, 7, 4
ACK = 1


class Caller:
    """A connection; says nothing by itself but that it is one."""

    def __init__(self, address: str):
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=20)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(SETTINGS)

    def send(self, kind: int, flags: int = 0, payload: bytes = b"") -> None:
        header = len(payload).to_bytes(3) + bytes([kind, flags]) + bytes(4)
        self._socket.sendall(header + payload)

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Kind, flags and payload of what comes, until the other end closes."""
        while header := self._read(9):
            yield header[3], header[4], self._read(int.from_bytes(header[:3]))

    def ping(self) -> bool:
        """Whether it is answered; if not, the connection is closed."""
        try:
            self.send(PING, payload=bytes(8))
        except (BrokenPipeError, ConnectionResetError):
            return False
        return any((kind, flags) == (PING, ACK) for kind, flags, _ in self.frames())

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self._socket.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                return b""
            data += more
        return data

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def silent(folder: Path) -> Iterator[Caller]:
    """Of a frontend that looks at silent connections after a second."""
    with Frontend(folder, keepalive=1) as frontend:
        caller = Caller(frontend.address)
        yield caller
        caller.close()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frontends that begin now soon give up who does not answer."""
    monkeypatch.setattr(transport, "ANSWER_WITHIN", 0.2)


def test_a_caller_that_vanished_is_given_up(soon: None, silent: Caller) -> None:
    """Even without an open call; were it not, this would wait for more until it fails."""
    kinds = [kind for kind, flags, _ in silent.frames() if not flags & ACK]
    assert PING in kinds  # it was looked at, before the connection was closed


def test_a_caller_that_answers_is_kept(silent: Caller) -> None:
    answered = 0
    for kind, flags, payload in silent.frames():
        if kind == PING and not flags & ACK:
            silent.send(PING, ACK, payload)
            answered += 1
        if answered == 2:  # the second look comes after the first was over
            return
    raise AssertionError("it was given up")


@pytest.mark.parametrize(("allowed", "stays"), [(0.0, True), (3600.0, False)])
def test_callers_may_look_as_often_as_is_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, allowed: float, stays: bool
) -> None:
    monkeypatch.setattr(transport, "LOOKS_ALLOWED", allowed)
    with Frontend(folder) as frontend:
        caller = Caller(frontend.address)
        assert all(caller.ping() for _ in range(8)) == stays
        caller.close()


def test_as_often_as_clients_do() -> None:
    assert transport.LOOKS_ALLOWED <= 10 and transport.ANSWER_WITHIN == 20
    assert channel.LOOK_AFTER > 1.2 * transport.LOOKS_ALLOWED
