"""A frontend's way to the engine process: an `EngineLink` over a stream of protos/v1/engine.proto
(serving/engine_stream.py).

One of these lives as long as its stream. When that ends, or the engine says nothing for too long,
all that is open ends with Unavailable, and whoever owns it (main.py) attaches anew.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import Internal, QuireError, Unavailable
from ...protos.v1 import engine_pb2 as pb
from ...sched.request import FinishReason, Request, RequestOutput
from ..engine_stream import EngineStream, OtherEnd, connect
from ..engine_wire import (
    LIVENESS,
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
        self, stream: EngineStream[pb.FromEngine], welcome: pb.Welcome, liveness: Liveness
    ):
        self.welcome, self._liveness = welcome, liveness
        self.spec = spec_of(welcome.limits)
        self.served = Served(welcome.name, welcome.dtype)
        self.folder = welcome.folder
        self.ignore_config_fields = tuple(welcome.ignore_config_fields)
        self._stream = stream
        self._open: dict[int, tuple[str, Pending]] = {}  # by handle
        self._handles: dict[str, int] = {}  # by request id
        self._pace = Pace()
        self._draw = itertools.count(1)
        self._next = pb.ToEngine()
        self._is_due = False  # what is next goes out with the next turn of the loop
        self._why_closed: str | None = None
        stream.listen(self._hear)
        self._beating = asyncio.ensure_future(stream.beat(pb.ToEngine(), liveness.heartbeat))
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
        try:
            stream = await connect(address, pb.FromEngine)
        except OSError as error:
            raise Unavailable(f"the engine cannot be reached: {error}") from error
        try:
            stream.send(pb.ToEngine(hello=pb.Hello(protocol=PROTOCOL, name=name, pid=os.getpid())))
            message = await stream.read()
            if message is None:
                raise Unavailable("the engine process went away")
            if message.welcome.protocol != PROTOCOL:
                raise _other_build(f"protocol {message.welcome.protocol}")
            return cls(stream, message.welcome, liveness)
        except OtherEnd as error:
            stream.abort()
            raise _other_build(str(error)) from error
        except BaseException:
            stream.abort()
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
        try:
            self._say()  # a turn of a busy loop takes as long as many messages
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
            self._say_soon()

    def refused(self, error: QuireError, request_id: str, tenant: str) -> None:
        if self._why_closed is None:
            self._next.refused.append(refused_message(error, request_id, tenant))
            self._say_soon()

    def make_way(self) -> None:
        self._pace.make_way()

    async def lost(self) -> None:
        """Returns when the engine is gone, or the link was closed."""
        await asyncio.wait([self._ended])

    async def close(self, why: str) -> None:
        """Ends what is open with Unavailable, and leaves the engine, which frees its pages."""
        self._end(why)
        self._beating.cancel()
        self._ended.cancel()
        await asyncio.wait([self._beating, self._ended])
        self._stream.abort()

    # ---- the stream

    async def _watch(self) -> None:
        """Ends the link when its stream ends, or the engine is silent."""
        silence = asyncio.ensure_future(self._stream.silent(self._liveness.silence))
        ended = self._stream.ended
        either: tuple[asyncio.Future[Any], ...] = ended, silence
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            silence.cancel()
        calls = len(self._open)
        self._end(GONE)
        self._beating.cancel()
        if not ended.done():
            why = f"it has said nothing for {self._liveness.silence:g} s"
        else:
            why = f"its stream broke: {ended.result()}" if ended.result() else "it hung up"
        # The parent knows more of an engine that died, and says it.
        log.warning(
            "the engine is lost (%s); %d requests to it end with UNAVAILABLE",
            why,
            calls,
            extra=fields(process="the engine", pid=self.welcome.pid),
        )

    def _end(self, why: str) -> None:
        if self._why_closed is not None:
            return
        self._why_closed = why
        for request_id, pending in self._open.values():
            error = Unavailable(f"request {request_id!r}: {why}")
            pending.put(
                RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error, ended=True)
            )

    def _hear(self, message: pb.FromEngine) -> None:
        for step in message.steps:
            self._take(step)
        if message.awaited:
            # A loop that is behind comes to it later, and gets several steps in one message.
            self._next.taken = True
            self._say_soon()

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

    def _say_soon(self) -> None:
        """Sends what is next when all have had their turn who wait for one."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._say)

    def _say(self) -> None:
        self._is_due = False
        if self._next.ByteSize():  # or it went with something that did not wait
            message, self._next = self._next, pb.ToEngine()
            self._stream.send(message)


def _other_build(how: str) -> Internal:
    return Internal(
        f"the engine process is of another build of Quire ({how}; ours is protocol {PROTOCOL}); "
        "start the server again"
    )
