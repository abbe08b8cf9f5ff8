"""A frontend's way to the engine process: an `EngineLink` over a stream of protos/v1/engine.proto.

One of these lives as long as its stream. When that ends, or the engine says nothing for too long,
all that is open ends with Unavailable, and whoever owns it (main.py) attaches anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from ...errors import Internal, QuireError, Unavailable
from ...protos.v1 import engine_pb2 as pb
from ...protos.v1 import engine_pb2_grpc as pb_grpc
from ...sched.request import FinishReason, Request, RequestOutput
from ..engine_wire import (
    LIVENESS,
    OPTIONS,
    PROTOCOL,
    Liveness,
    output_of,
    refused_message,
    spec_of,
    submit_message,
)
from ..intake import Served
from ..telemetry.logs import fields
from .pending import Pace, Pending

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the type stubs do not know it
log = logging.getLogger(__name__)

GONE = "the engine is gone and is being started again; try again when health says SERVING"
"""What callers hear while there is no engine."""


class RemoteLink:
    """An `EngineLink` (serving/frontend/engine_link.py). Made by `attach`; `close` it in any case.

    Attributes:
      welcome: how the engine introduced itself.
      spec: its limits.
      served: what model it is.
      folder: of the model.
      ignore_config_fields: with which the folder is to be opened.
    """

    def __init__(
        self, channel: grpc.aio.Channel, call: Any, welcome: pb.Welcome, liveness: Liveness
    ):
        self.welcome, self._liveness = welcome, liveness
        self.spec = spec_of(welcome.limits)
        self.served = Served(welcome.name, welcome.dtype)
        self.folder = welcome.folder
        self.ignore_config_fields = tuple(welcome.ignore_config_fields)
        self._channel, self._call = channel, call
        self._open: dict[int, tuple[str, Pending]] = {}  # by handle
        self._handles: dict[str, int] = {}  # by request id
        self._pace = Pace()
        self._draw = itertools.count(1)
        self._next = pb.ToEngine()
        self._news = asyncio.Event()
        self._why_closed: str | None = None
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._write())]
        self._ended = asyncio.ensure_future(self._watch())

    @classmethod
    async def attach(
        cls, address: str, name: str = "a frontend", liveness: Liveness = LIVENESS
    ) -> RemoteLink:
        """Attaches to the engine, and returns once that serves.

        Args:
          address: of the engine process, such as unix:/path.
          name: of this frontend, for people.
          liveness: see there.

        Raises:
          Unavailable: there is none, or it went away.
          Internal: it is of another build, and stays that until it is started again.
        """
        channel = grpc.aio.insecure_channel(address, options=OPTIONS)
        try:
            stub = pb_grpc.EngineServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Attach()
            hello = pb.Hello(protocol=PROTOCOL, name=name, pid=os.getpid())
            await call.write(pb.ToEngine(hello=hello))
            message = await call.read()
            if message is EOF:
                raise Unavailable("the engine process went away")
            if message.welcome.protocol != PROTOCOL:
                raise _other_build(f"protocol {message.welcome.protocol}")
            return cls(channel, call, message.welcome, liveness)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            await channel.close(None)
            code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
            if code is grpc.StatusCode.FAILED_PRECONDITION:
                raise _other_build(_in_short(error)) from error
            raise Unavailable(f"the engine cannot be reached: {_in_short(error)}") from error
        except BaseException:
            await channel.close(None)
            raise

    @property
    def healthy(self) -> bool:
        return self._why_closed is None

    @contextmanager
    def open(self, request: Request) -> Iterator[Pending]:
        if self._why_closed is not None:
            raise Unavailable(self._why_closed)
        handle, pending = next(self._draw), Pending(request.id, self._pace)
        self._next.submits.append(submit_message(handle, request))  # first, because it may raise
        self._open[handle] = request.id, pending
        self._handles[request.id] = handle
        self._news.set()
        try:
            yield pending
        finally:
            self._open.pop(handle, None)
            self._handles.pop(request.id, None)

    def finish(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        choice: int | None = None,
    ) -> None:
        handle = self._handles.get(request_id)
        if handle is not None and self._why_closed is None:
            self._next.finishes.append(pb.Finish(handle=handle, reason=reason, choice=choice))
            self._news.set()

    def refused(self, error: QuireError, request_id: str, tenant: str) -> None:
        if self._why_closed is None:
            self._next.refused.append(refused_message(error, request_id, tenant))
            self._news.set()

    async def lost(self) -> None:
        """Returns when the engine is gone, or the link was closed."""
        await asyncio.wait([self._ended])

    async def close(self, why: str) -> None:
        """Ends what is open with Unavailable, and leaves the engine, which frees its pages."""
        self._end(why)
        for task in (*self._tasks, self._ended):
            task.cancel()
        await asyncio.wait([*self._tasks, self._ended])
        self._call.cancel()
        await self._channel.close(None)

    # ---- the stream

    async def _watch(self) -> None:
        """Ends the link when either of its tasks does."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        calls = len(self._open)
        self._end(GONE)
        why = await self._how_it_ended(done)
        for task in self._tasks:
            task.cancel()
        # The parent knows more of an engine that died, and says it.
        log.warning(
            "the engine is lost (%s); %d requests to it end with UNAVAILABLE",
            why,
            calls,
            extra=fields(process="the engine", pid=self.welcome.pid),
        )

    async def _how_it_ended(self, done: Iterable[asyncio.Task[None]]) -> str:
        for task in done:
            error = None if task.cancelled() else task.exception()
            if error and not isinstance(error, (grpc.aio.AioRpcError, asyncio.InvalidStateError)):
                return _in_short(error)
        # Either task may be the first to hear of it, each in its own words; the call knows best.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._liveness.heartbeat):
                if details := await self._call.details():
                    return f"its stream broke: {details}"
        return "it hung up"

    def _end(self, why: str) -> None:
        if self._why_closed is not None:
            return
        self._why_closed = why
        for request_id, pending in self._open.values():
            error = Unavailable(f"request {request_id!r}: {why}")
            pending.put(
                RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error, ended=True)
            )

    async def _read(self) -> None:
        silence = self._liveness.silence
        while True:
            try:
                async with asyncio.timeout(silence):
                    message: pb.FromEngine = await self._call.read()
            except TimeoutError:
                raise Unavailable(f"it has said nothing for {silence:g} s") from None
            if message is EOF:
                return
            for step in message.steps:
                self._take(step)
            if message.awaited:
                # Goes out when it is the writer's turn: a loop that is behind gets several in one.
                self._next.taken = True
                self._news.set()

    def _take(self, step: pb.Step) -> None:
        opened = self._open  # who is not in it has left
        if step.counts:
            tokens = iter(step.tokens)
            for handle, count in zip(step.handles, step.counts, strict=True):
                given = list(itertools.islice(tokens, count))
                if found := opened.get(handle):
                    found[1].put_tokens(given)
        else:
            for handle, token in zip(step.handles, step.tokens, strict=True):
                if found := opened.get(handle):
                    found[1].put_tokens((token,))
        for output in step.outputs:
            if found := opened.get(output.handle):
                request_id, pending = found
                pending.put(output_of(output, request_id))

    async def _write(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._liveness.heartbeat):
                    await self._news.wait()
            except TimeoutError:
                pass  # then the message is empty
            self._news.clear()
            message, self._next = self._next, pb.ToEngine()
            await self._call.write(message)


def _other_build(how: str) -> Internal:
    return Internal(
        f"the engine process is of another build of Quire ({how}; ours is protocol {PROTOCOL}); "
        "start the server again"
    )


def _in_short(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or type(error).__name__
