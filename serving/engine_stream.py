"""A stream of messages (protos/v1/engine.proto) over a Unix socket: what lies between a frontend
process and the engine process. Both ends use it (frontend/remote_link.py, engine_host/host.py).

    send ──> 4 bytes of length, the message ──> hear, at once

A step's tokens and a new request wait here for nothing: what comes is handled where the event loop
reads it, without a task that would have to be woken, and what is sent is written at the end of the
same turn of the loop. (grpc.aio takes a thread's wake-up and two turns at either end, and ten times
the CPU, for which it needs the interpreter's lock that the engine's thread has.)
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

from google.protobuf.message import Message

Heard = TypeVar("Heard", bound=Message)

log = logging.getLogger(__name__)

GREETING = b"quire engine stream\n"
"""The first bytes that either end sends: an end of another build may speak something else."""

_LENGTH = struct.Struct("<I")
_LONGEST = 1 << 30
"""Bytes of a message, above which a length is taken for damage."""
_FLUSH = 1.0
"""Seconds in which the other end takes what was said before this one hung up."""
_UNIX = "unix:"


class OtherEnd(Exception):
    """What the other end speaks is no stream of this kind."""


class EngineStream(asyncio.Protocol, Generic[Heard]):
    """One end. On one event loop.

    Args:
      kind: of the messages that come.
      opened: is called once there is a connection.

    Attributes:
      ended: when it is over, with why: empty where the other end, or this one, hung up.
    """

    def __init__(
        self, kind: type[Heard], opened: Callable[[EngineStream[Heard]], None] | None = None
    ) -> None:
        self._kind, self._opened = kind, opened
        loop = asyncio.get_running_loop()
        self._loop = loop
        self.ended: asyncio.Future[str] = loop.create_future()
        self._why = ""
        self._greeted = self._is_other = False
        self._held = bytearray()  # of which no message was made yet
        self._unheard: deque[Heard] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._hear: Callable[[Heard], None] | None = None
        self._heard_at = self._said_at = loop.time()

    def send(self, message: Message) -> None:
        """Sends it with this turn of the loop; drops it where the stream is over."""
        self._said_at = self._loop.time()
        if self._transport.is_closing():
            return
        data = message.SerializeToString()
        self._transport.write(_LENGTH.pack(len(data)) + data)

    async def read(self) -> Heard | None:
        """The next message; None when the stream is over. Only before `listen`.

        Raises:
          OtherEnd: the other end does not speak this.
        """
        while not self._unheard:
            if self.ended.done():
                if self._is_other:
                    raise OtherEnd(self._why)
                return None
            self._waiting = self._loop.create_future()
            await self._waiting
        return self._unheard.popleft()

    def listen(self, hear: Callable[[Heard], None]) -> None:
        """Has all messages from now on heard as they come. What raises ends the stream."""
        self._hear = hear
        while self._unheard and not self._transport.is_closing():
            self._tell(self._unheard.popleft())

    async def silent(self, seconds: float) -> None:
        """Returns when the other end has said nothing for so long, from now on."""
        begin = self._loop.time()  # before, nobody may have expected to hear anything
        while (left := max(begin, self._heard_at) + seconds - self._loop.time()) > 0:
            await asyncio.sleep(left)

    async def beat(self, empty: Message, seconds: float) -> None:
        """Says something empty whenever nothing was said for so long, until the stream is over."""
        while not self._transport.is_closing():
            left = self._said_at + seconds - self._loop.time()
            if left <= 0:
                self.send(empty)
            else:
                await asyncio.sleep(left)

    def close(self) -> None:
        """Hangs up, once all is sent that was said."""
        self._transport.close()

    def abort(self) -> None:
        """Hangs up."""
        self._transport.abort()

    # ---- asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(GREETING)
        if self._opened is not None:
            self._opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self._why or (str(exc) if exc is not None else ""))
        self._wake()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        held = self._held
        held += data
        if not self._greeted:
            if held[: len(GREETING)] != GREETING[: len(held)]:
                self._is_other = True
                self._break("it speaks something else")
                return
            if len(held) < len(GREETING):
                return
            del held[: len(GREETING)]
            self._greeted = True
        while len(held) >= _LENGTH.size and not self._transport.is_closing():
            (length,) = _LENGTH.unpack_from(held)
            if length > _LONGEST:
                self._break(f"it announced a message of {length} bytes, at most {_LONGEST} can be")
                return
            end = _LENGTH.size + length
            if len(held) < end:
                return
            message = bytes(memoryview(held)[_LENGTH.size : end])
            del held[:end]
            try:
                made = self._kind.FromString(message)
            except Exception as fault:
                self._break(f"it sent what is no message: {fault}")
                return
            if self._hear is None:
                self._unheard.append(made)
                self._wake()
            else:
                self._tell(made)

    def _tell(self, message: Heard) -> None:
        assert self._hear is not None
        try:
            self._hear(message)
        except Exception as fault:
            log.exception("a message of the engine stream could not be dealt with")
            self._break(f"what it said could not be dealt with: {fault!r}")

    def _break(self, why: str) -> None:
        self._why = why
        self._transport.abort()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


async def connect(address: str, kind: type[Heard]) -> EngineStream[Heard]:
    """A stream to whoever listens there.

    Args:
      address: "unix:" and the path.

    Raises:
      OSError: nobody does.
    """
    loop = asyncio.get_running_loop()
    _, stream = await loop.create_unix_connection(
        lambda: EngineStream(kind), address.removeprefix(_UNIX)
    )
    return stream


class Listener:
    """Has a coroutine deal with each stream that is opened; made by `listen`."""

    def __init__(self) -> None:
        self._server: asyncio.AbstractServer | None = None
        self._tasks: dict[asyncio.Task[None], EngineStream[Any]] = {}

    def opened(
        self,
        stream: EngineStream[Any],
        serve: Callable[[EngineStream[Any]], Coroutine[Any, Any, None]],
    ) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(stream, serve))
        self._tasks[task] = stream
        task.add_done_callback(lambda task: self._tasks.pop(task, None))

    async def _serve(
        self, stream: EngineStream[Any], serve: Callable[[EngineStream[Any]], Awaitable[None]]
    ) -> None:
        try:
            await serve(stream)
        except Exception:
            log.exception("a frontend's stream ends")
            stream.abort()
        finally:
            stream.close()
            await asyncio.wait([stream.ended], timeout=_FLUSH)
            stream.abort()  # who does not read is not waited for

    async def stop(self, seconds: float | None) -> None:
        """Takes no more streams; ends those there are, after so many seconds at the latest."""
        if self._server is not None:
            self._server.close()
        if self._tasks and seconds:
            await asyncio.wait(self._tasks, timeout=seconds)
        for task, stream in list(self._tasks.items()):
            task.cancel()
            stream.abort()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def listen(
    address: str,
    kind: type[Heard],
    serve: Callable[[EngineStream[Heard]], Coroutine[Any, Any, None]],
) -> Listener:
    """Serves streams at an address; a socket that a dead process left there goes first.

    Args:
      address: "unix:" and a path.
      serve: deals with one stream, which is closed when it returns.
    """
    listener = Listener()
    loop = asyncio.get_running_loop()
    listener._server = await loop.create_unix_server(
        lambda: EngineStream(kind, lambda stream: listener.opened(stream, serve)),
        address.removeprefix(_UNIX),
    )
    return listener
