"""A frontend without an engine process behind it, in a thread of its own: what is between callers
and the engine, as callers see it. Its engine answers every request at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from quire.checkpoints.folder import Checkpoint
from quire.config import ServerConfig
from quire.errors import QuireError
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1 import generation_pb2_grpc as pb_grpc
from quire.sched.request import FinishReason, Request, RequestOutput
from quire.serving.auth.interceptor import KeyInterceptor
from quire.serving.frontend.pending import Pending
from quire.serving.frontend.server import Server
from quire.serving.intake import Intake
from quire.tools.bench.null_runner import null_spec

END = FinishReason.LENGTH
ASK = pb.GenerateRequest(text="the quick brown fox")


class Answering:
    """An EngineLink; `requests` are those it got, `tokens` what it answers, `told` the calls that
    ended without it: code, id, tenant; `made_way` for so many."""

    healthy = True

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.tokens = (7,)
        self.told: list[tuple[str, str, str]] = []
        self.made_way = 0

    def make_way(self) -> None:
        self.made_way += 1

    @contextmanager
    def open(self, request: Request) -> Iterator[Pending]:
        self.requests.append(request)
        pending = Pending(request.id)
        pending.put(RequestOutput(request.id, self.tokens, finish_reason=END, ended=True))
        yield pending

    def finish(self, *_: Any) -> None:
        pass

    def refused(self, error: QuireError, request_id: str, tenant: str) -> None:
        self.told.append((error.grpc_code, request_id, tenant))

    async def close(self, why: str) -> None:
        pass


class Frontend:
    """Serves while the block runs.

    Attributes:
      link: what stands for the engine.
      address: HOST:PORT.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        **settings: Any,
    ):
        self._settings = ServerConfig(port=0, **settings)
        self._interceptors = interceptors
        spec = null_spec(4, page_size=16, max_model_len=4096, pages=600)
        self._intake = Intake(Checkpoint.open(folder), spec)
        self.link = Answering()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._channels: list[grpc.Channel] = []

    def __enter__(self) -> Frontend:
        self._thread.start()
        try:
            self.run(self._begin)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for channel in self._channels:
            channel.close()
        self.run(self.server.stop)
        self._end()

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _begin(self) -> None:
        self.server = Server(self._settings, interceptors=self._interceptors)
        try:
            await self.server.bind()
        except BaseException:
            await self.server.stop()
            raise
        await self.server.serve(self.link, self._intake)  # type: ignore[arg-type]
        for interceptor in self._interceptors:
            if isinstance(interceptor, KeyInterceptor):
                interceptor.refused = self.server.account

    def run(self, work: Callable[[], Any]) -> Any:
        """Runs a coroutine on the event loop."""

        async def awaited() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(awaited(), self.loop).result(60)

    @property
    def thread(self) -> int | None:
        """That of the event loop."""
        return self._thread.ident

    @property
    def address(self) -> str:
        return self.server.address

    def channel(
        self, credentials: grpc.ChannelCredentials | None = None, *options: tuple[str, Any]
    ) -> grpc.Channel:
        """A channel of its own, with a connection of its own."""
        options = (*options, ("grpc.use_local_subchannel_pool", 1))
        if credentials is None:
            made = grpc.insecure_channel(self.address, options=options)
        else:
            made = grpc.secure_channel(self.address, credentials, options=options)
        self._channels.append(made)
        return made

    def stub(self, *args: Any) -> pb_grpc.GenerationServiceStub:
        return pb_grpc.GenerationServiceStub(self.channel(*args))
