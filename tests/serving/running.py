"""A gRPC server in a thread of its own, so that tests call it as clients do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from engines import SETTINGS
from grpc_health.v1 import health_pb2, health_pb2_grpc

from quire import EngineConfig
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.sched.engine import Engine
from quire.serving.assemble import Assembled, Deliver, assemble
from quire.serving.server import Server

Result = TypeVar("Result")

SERVICE = "quire.v1.GenerationService"


class Running:
    """A bound server; `open` loads the model. Close it, or use `with`."""

    parts: Assembled

    def __init__(self, folder: Path, **settings: Any):
        self._config = EngineConfig(model=str(folder), **{**SETTINGS, **settings})
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.server = self.run(self._bind)
        self.channel = grpc.insecure_channel(self.server.address)
        self.stub = pb_grpc.GenerationServiceStub(self.channel)
        self._health = health_pb2_grpc.HealthStub(self.channel)

    async def _bind(self) -> Server:
        server = Server("127.0.0.1", 0)
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
        def build(deliver: Deliver) -> Assembled:
            return assemble(self._config, deliver)

        self.parts = self.run(lambda: self.server.open(build))
        return self

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
        self.run(self.server.stop)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.loop.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
