"""A frontend and an engine host in a thread of their own, so that tests call them as clients do.

The two talk as they do in processes of their own (serving/supervisor), over a socket; here tests
can reach into both.
"""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from engines import SETTINGS
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire import EngineConfig
from quire.config import ServerConfig
from quire.protos.v1 import engine_pb2
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.sched.engine import Engine
from quire.sched.request import RequestOutput
from quire.serving.assemble import Assembled, assemble
from quire.serving.engine_host.host import EngineHost
from quire.serving.engine_stream import Listener, listen
from quire.serving.engine_wire import Liveness
from quire.serving.frontend.remote_link import RemoteLink
from quire.serving.frontend.server import Server
from quire.serving.telemetry.telemetry import Telemetry

Result = TypeVar("Result")

SERVICE = "quire.v1.GenerationService"

# A server outlives the tests that ask it, and others in this process hold the interpreter for
# longer than either side would wait: compiling for an absent TPU does.
LIVENESS = Liveness(silence=600.0)


class Running:
    """A bound server; `open` loads the model. Close it, or use `with`."""

    parts: Assembled
    host: EngineHost
    link: RemoteLink

    def __init__(self, folder: Path, *, telemetry: Telemetry | None = None, **settings: Any):
        self._telemetry = telemetry
        self._config = EngineConfig(model=str(folder), **{**SETTINGS, **settings})
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self._internal: Listener | None = None
        self.server = self.run(self._bind)
        self.channel = grpc.insecure_channel(self.server.address)
        self.stub = pb_grpc.GenerationServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    async def _bind(self) -> Server:
        server = Server(ServerConfig(port=0))
        await server.bind()
        return server

    def run(self, work: Callable[[], Awaitable[Result]]) -> Result:
        """Runs a coroutine on the server's event loop."""

        async def awaited() -> Result:
            return await work()

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(60)

    def start(self, work: Callable[[], Any]) -> Any:
        """Starts a coroutine on the server's event loop; returns its future."""
        return asyncio.run_coroutine_threadsafe(work(), self.loop)

    def open(self) -> Running:
        self.run(self._open)
        return self

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        told = self._telemetry
        refused = {"refused": told.refused} if told else {}
        self.host = host = EngineHost(loop, **refused, liveness=LIVENESS)

        def deliver(outputs: list[RequestOutput]) -> None:
            host.deliver(outputs)
            if told:
                told.on_outputs(outputs)

        self._folder = tempfile.TemporaryDirectory(prefix="quire-test-")
        self.engine_address = f"unix:{self._folder.name}/engine"
        self._internal = await listen(self.engine_address, engine_pb2.ToEngine, host.attach)
        self.parts = parts = await loop.run_in_executor(None, assemble, self._config, deliver)
        folder, served = str(parts.checkpoint.folder), parts.intake.served
        host.open(parts.engine, parts.sizes.spec, folder, (), served)
        self.link = await RemoteLink.attach(self.engine_address, liveness=LIVENESS)
        await self.server.serve(self.link, parts.intake)

    @property
    def engine(self) -> Engine:
        return self.parts.engine

    def health(self, service: str = "") -> str:
        response = self._health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def watch_health(self) -> Any:
        return self._health.Watch(health_pb2.HealthCheckRequest(), timeout=60)

    def close(self) -> None:
        self.channel.close()
        self.run(self._close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.loop.close()

    async def _close(self) -> None:
        await self.server.stop()
        if self._internal is not None:
            await asyncio.to_thread(self.engine.stop, drain=False)
            await self._internal.stop(1.0)
            self._folder.cleanup()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
