"""The life of a gRPC server: bound, loading, serving, draining. Run by tools/serve_command.py.

Its port is taken before the model loads, so that a taken one is known at once, and health says
NOT_SERVING until the engine is ready and again when it stops or has failed.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..errors import Unavailable
from ..protos.v1 import generation_pb2_grpc as pb_grpc
from .assemble import Assembled, Deliver
from .engine_link import LocalLink, Mailbox
from .grpc_server import SERVICE_NAME, GenerationService

MAX_MESSAGE_BYTES = 64 << 20
"""Of a request: a prompt of a million tokens takes 4 MB, which is grpc's own limit."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # By default a second server may bind the same port, and get some of the calls.
    ("grpc.so_reuseport", 0),
    # Finds out about callers that vanished without a word, whose requests would hold their pages.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Lets clients look for a vanished server as often as once in 10 s.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)

_LAST_WORDS = 1.0
"""Seconds for last messages to be sent when the server ends."""

_LOOK_EVERY = 0.5
"""Seconds between looks at whether the engine is alive."""


class Server:
    """Binds at once; serves once opened; `stop` it in any case.

    Args:
      host: address to bind, a name or an IPv4 or IPv6 address.
      port: 0 takes a free one.
    """

    def __init__(self, host: str, port: int):
        self._host, self._wanted = f"[{host}]" if ":" in host else host, port
        self._server = grpc.aio.server(options=_OPTIONS)
        # The type stubs do not know it.
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._service = GenerationService()
        self._parts: Assembled | None = None
        pb_grpc.add_GenerationServiceServicer_to_server(  # type: ignore[no-untyped-call]
            self._service, self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = 0

    @property
    def address(self) -> str:
        """HOST:PORT, once bound."""
        return f"{self._host}:{self.port}"

    async def bind(self) -> None:
        """Starts listening, NOT_SERVING.

        Raises:
          Unavailable: the address cannot be bound.
        """
        address = f"{self._host}:{self._wanted}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise Unavailable(
                f"host, port: cannot bind {address}; {_why_not(self._host)} ({error})"
            ) from error
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def open(self, build: Callable[[Deliver], Assembled]) -> Assembled:
        """Builds the engine off the event loop, then serves it.

        Args:
          build: called with where the engine is to deliver outputs; returns it started.
        """
        loop = asyncio.get_running_loop()
        mailbox = Mailbox(loop)
        parts = self._parts = await loop.run_in_executor(None, build, mailbox.deliver)
        self._service.open(LocalLink(parts.engine, mailbox), parts.intake)
        await self._say(health_pb2.HealthCheckResponse.SERVING)
        return parts

    async def engine_failed(self) -> None:
        """Returns when the engine has failed; from then on health says NOT_SERVING."""
        while self._parts is None or self._parts.engine.healthy:
            await asyncio.sleep(_LOOK_EVERY)
        self._service.refuse("the engine failed; see the server's log")
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def drain(self) -> None:
        """Takes no more calls, and returns when those that run have ended."""
        self._service.refuse("the server is stopping")
        await self._health.enter_graceful_shutdown()
        await self._service.idle()

    async def stop(self) -> None:
        """Ends what still runs, with UNAVAILABLE, and the engine and the server."""
        self._service.refuse("the server is stopping")
        if self._parts is not None:
            engine = self._parts.engine
            await asyncio.to_thread(engine.stop, drain=False)
        # Health watchers never end by themselves; calls have just been told to.
        await self._server.stop(_LAST_WORDS)

    async def _say(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)


def _why_not(host: str) -> str:
    """What may keep an address from being bound; grpc does not say."""
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except (OSError, UnicodeError):
        return "the host is no address, and as a name it cannot be resolved"
    return "another process has the port, or this machine lacks the address"
