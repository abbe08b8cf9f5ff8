"""The life of a gRPC server: bound, serving while there is an engine, draining.

Owned by a frontend process (serving/frontend/main.py). Its port is taken before the model loads,
and health says NOT_SERVING until the engine is ready, while it is gone, and when it stops.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ...config import ServerConfig
from ...errors import QuireError, Unavailable
from ...protos.v1 import generation_pb2_grpc as pb_grpc
from ..intake import Intake
from .admission import SERVICE, Admission
from .engine_link import EngineLink
from .service import GenerationService
from .transport import add_port, make_server

_LAST_WORDS = 1.0
"""Seconds for last messages to be sent when the server ends."""


class Server:
    """Binds at once; serves once it has an engine; `stop` it in any case.

    Args:
      settings: of the service.
      port: instead of the one in the settings.
      shared: other frontends have the port too, and get some of the calls.
      interceptors: see each call that is admitted first, in this order.
    """

    def __init__(
        self,
        settings: ServerConfig,
        *,
        port: int | None = None,
        shared: bool = False,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    ):
        host = settings.host
        self._settings = settings
        self._host = f"[{host}]" if ":" in host else host
        self._wanted = settings.port if port is None else port
        self._service = GenerationService()
        self._admission = Admission(settings.max_calls, self._service.account, self._make_way)
        self._server = make_server(
            settings, shared=shared, interceptors=(self._admission, *interceptors)
        )
        # The type stubs do not know it.
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._link: EngineLink | None = None
        pb_grpc.add_GenerationServiceServicer_to_server(  # type: ignore[no-untyped-call]
            self._service, self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self.port = 0

    @property
    def address(self) -> str:
        """HOST:PORT, once bound."""
        return f"{self._host}:{self.port}"

    async def bind(self) -> None:
        """Starts listening, NOT_SERVING.

        Raises:
          Unavailable: the address cannot be bound.
          InvalidConfig: a TLS file is wrong.
        """
        address = f"{self._host}:{self._wanted}"
        try:
            self.port = add_port(self._server, address, self._settings)
        except RuntimeError as error:
            raise Unavailable(
                f"host, port: cannot bind {address}; {_why_not(self._host)} ({error})"
            ) from error
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def serve(self, link: EngineLink, intake: Intake) -> None:
        """Answers calls by this engine from now on."""
        self._link = link
        self._service.open(link, intake)
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    def account(self, error: QuireError) -> None:
        """Lets metrics and log have an error of a call that was turned away."""
        self._service.account(error)

    def _make_way(self) -> None:
        if self._link is not None:
            self._link.make_way()

    async def pause(self, why: str) -> None:
        """Answers calls with UNAVAILABLE until it is given another engine."""
        self._service.refuse(why)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Takes no more calls, and returns when those that run have ended."""
        self._service.refuse("the server is stopping")
        await self._health.enter_graceful_shutdown()
        await self._service.calls.idle()

    async def stop(self) -> None:
        """Ends what still runs, with UNAVAILABLE, and the server. The engine is somebody else's."""
        self._service.refuse("the server is stopping")
        if self._link is not None:
            await self._link.close("the server was stopped")
        # Health watchers never end by themselves; calls have just been told to.
        await self._server.stop(_LAST_WORDS)
        self._service.close()

    async def _say(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE.full_name):
            await self._health.set(name, status)


def _why_not(host: str) -> str:
    """What may keep an address from being bound; grpc does not say."""
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError):
        return "the host is no address, and as a name it cannot be resolved"
    return "another process has the port, or this machine lacks the address"
