"""Serves one engine to frontends (protos/v1/engine.proto), in the engine's process.

    engine thread:  Engine --EngineHost.deliver(outputs of a step)--> event loop
    event loop:     sorts them by frontend, one Step each; each frontend's stream takes its Step
                    stream ── Submit, Finish ──> Engine's inbox

A frontend that is gone, or says nothing for too long, is detached: its requests end, and their
pages are free with the next step. When one is sent what waits for it: attached.py.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

from ...errors import Internal, Overloaded, QuireError
from ...model.plan import RunnerSpec
from ...protos.v1 import engine_pb2 as pb
from ...sched.engine import Engine
from ...sched.request import FinishReason, RequestOutput
from ..engine_stream import EngineStream, OtherEnd
from ..engine_wire import (
    LIVENESS,
    PROTOCOL,
    Liveness,
    error_message,
    error_of,
    limits_message,
    request_of,
)
from ..intake import Served
from ..telemetry.logs import fields
from .attached import Attached, Route, StepDraft
from .names import Names

log = logging.getLogger(__name__)


class EngineHost:
    """Of one engine. Frontends may attach at any time; they are served from `open` on.

    Args:
      loop: the event loop that it serves on.
      refused: hears of requests that were refused, here or by frontends: why, id, tenant.
      liveness: see there.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        refused: Callable[[QuireError, str, str], None] = lambda *_: None,
        liveness: Liveness = LIVENESS,
    ):
        self._loop, self._refused, self._liveness = loop, refused, liveness
        self._engine: Engine | None = None
        self._welcome = pb.Welcome()
        self._opened = asyncio.Event()
        self._closed = asyncio.Event()
        self._frontends: set[Attached] = set()
        self._routes: dict[str, Route] = {}  # of all unfinished requests, by id
        self._names = Names()

    def open(
        self,
        engine: Engine,
        spec: RunnerSpec,
        folder: str,
        ignore_config_fields: tuple[str, ...],
        served: Served,
    ) -> None:
        """Starts serving an engine that delivers here.

        Args:
          engine: started.
          spec: its limits.
          folder: of the model; where frontends find its tokenizer.
          ignore_config_fields: as the engine's own.
          served: for those who ask which model it is.
        """
        self._engine = engine
        self._welcome = pb.Welcome(
            protocol=PROTOCOL,
            folder=folder,
            ignore_config_fields=ignore_config_fields,
            limits=limits_message(spec),
            name=served.name,
            dtype=served.dtype,
            pid=os.getpid(),
        )
        self._opened.set()

    @property
    def attached(self) -> int:
        """How many frontends are."""
        return len(self._frontends)

    async def close(self, seconds: float) -> None:
        """Sends frontends away, once they have what was delivered, or so many seconds are over."""
        end = self._loop.time() + seconds
        while any(f.behind for f in self._frontends) and self._loop.time() < end:
            await asyncio.sleep(0.005)
        self._closed.set()
        self._opened.set()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, outputs)
        except RuntimeError:
            # The loop was closed under a running engine; then nobody is left to tell.
            if not self._loop.is_closed():
                raise

    def _take(self, outputs: list[RequestOutput]) -> None:
        try:
            self._sort(outputs)
        except Exception:
            # Of whom outputs are lost is not known; whoever waits for them must not wait for ever.
            log.exception("a step's outputs are lost; all frontends are detached")
            for frontend in self._frontends:
                frontend.lost.set()

    def _sort(self, outputs: list[RequestOutput]) -> None:
        """One Step for each frontend that has a request among the outputs."""
        routes, steps = self._routes, dict[Attached, StepDraft]()
        for output in outputs:
            route = routes.get(output.request_id)
            if route is None:
                continue
            step = steps.get(route.frontend)
            if step is None:
                step = steps[route.frontend] = StepDraft()
            step.add(route, output)
            if output.ended:
                del routes[output.request_id]
                self._names.release(output.request_id)
                route.frontend.live.pop(route.handle, None)
        for frontend, step in steps.items():
            try:
                frontend.send(step.message(), urgent=step.urgent)
            except Exception:
                log.exception("a step's outputs are lost; their frontend is detached")
                frontend.lost.set()

    async def attach(self, stream: EngineStream[pb.ToEngine]) -> None:
        """Serves a frontend until either end has enough."""
        try:
            hello = await stream.read()
        except OtherEnd:
            return
        if hello is None:
            return
        if hello.hello.protocol != PROTOCOL:
            stream.send(pb.FromEngine(welcome=pb.Welcome(protocol=PROTOCOL)))
            return
        await self._opened.wait()
        if self._closed.is_set():
            return
        frontend = Attached(stream, hello.hello.name, hello.hello.pid)
        self._frontends.add(frontend)
        stream.send(pb.FromEngine(welcome=self._welcome))
        stream.listen(lambda message: self._hear(frontend, message))
        silent = asyncio.ensure_future(stream.silent(self._liveness.silence))
        tasks: list[asyncio.Future[Any]] = [
            silent,
            asyncio.ensure_future(stream.beat(pb.FromEngine(), self._liveness.heartbeat)),
            asyncio.ensure_future(self._closed.wait()),
            asyncio.ensure_future(frontend.lost.wait()),
        ]
        try:
            await asyncio.wait([*tasks, stream.ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if silent.done():
                seconds = self._liveness.silence
                frontend.log(logging.ERROR, f"has said nothing for {seconds:g} s and is detached")
                stream.abort()  # nor will it read what it was sent
            elif not self._closed.is_set():
                frontend.log(logging.WARNING if frontend.live else logging.DEBUG, "has left")
            for task in tasks:
                task.cancel()
            self._detach(frontend)

    def _hear(self, frontend: Attached, message: pb.ToEngine) -> None:
        """Does what a frontend says."""
        engine = self._engine
        assert engine is not None
        for submit in message.submits:
            self._submit(engine, frontend, submit)
        for finish in message.finishes:
            if request_id := frontend.live.get(finish.handle):
                choice = finish.choice if finish.HasField("choice") else None
                engine.finish(request_id, FinishReason(finish.reason), choice)
                if choice is None:  # its call is over; the name may come again at once
                    self._names.release(request_id)
        for refused in message.refused:
            self._refused(error_of(refused.error), refused.request_id, refused.tenant)
        if message.taken:
            frontend.taken()

    def _submit(self, engine: Engine, frontend: Attached, message: pb.Submit) -> None:
        route = Route(frontend, message.handle)
        error: QuireError
        try:
            request = request_of(message)
            self._names.check(request, frontend)
            # Outputs come by way of this event loop, so none can be here before its route.
            engine.submit(request)
            self._names.hold(request, frontend)
            self._routes[request.id] = route
            frontend.live[message.handle] = request.id
            return
        except QuireError as refusal:
            error = refusal
        except Exception:
            said = fields(request_id=message.id, tenant=message.tenant)
            log.exception("a request could not be submitted", extra=said)
            error = Internal(
                f"request {message.id!r}: a fault in Quire; the engine's log says more"
            )
        # An embedding that finds no room is tried again (frontend/embedding.py): no refusal yet.
        if not (message.pooled and isinstance(error, Overloaded)):
            self._refused(error, message.id, message.tenant)
        last = pb.Output(
            handle=message.handle,
            finish_reason=FinishReason.ERROR,
            error=error_message(error),
            ended=True,
        )
        frontend.send(pb.Step(outputs=[last]))

    def _detach(self, frontend: Attached) -> None:
        """Ends all that a frontend left unfinished."""
        self._frontends.discard(frontend)
        assert self._engine is not None
        for request_id in frontend.live.values():
            self._routes.pop(request_id, None)
            self._names.release(request_id)
            self._engine.finish(request_id)
        frontend.live.clear()
