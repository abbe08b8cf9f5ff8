"""Servers that a load can be sent to: Quire over gRPC, by its own client or, of a server on this
machine, by one that does little else. Used by serve.py, fairness.py and load_process.py.

All are asked for the same: token ids in, a fixed number of tokens out, greedy, end of sequence
ignored, streamed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import grpc

from ...client import TLS, AsyncClient, Retry
from ...client.messages import generate_request
from ...errors import QuireError, Unavailable
from ...protos.v1 import engine_pb2
from ...protos.v1 import generation_pb2 as pb
from ...serving.engine_wire import error_of
from .http2 import Streams

Told = Callable[[int, float | None], None]
"""Hears what a server says of a request at its end: how many prompt tokens it found in its prefix
index, and the seconds from the request's arrival in its engine to the first token there."""


class Target(Protocol):
    """One server. Entered before use, left after."""

    async def __aenter__(self) -> Target: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def stream(
        self, prompt: Sequence[int], output: int, told: Told = lambda hit, first: None
    ) -> AsyncIterator[int]:
        """Yields, as messages come, how many tokens have come in all.

        Args:
          told: is called if the server says any of that.

        Raises:
          QuireError: the request failed.
        """
        ...

    async def described(self) -> dict[str, Any]:
        """What the server says of its model and settings; empty if it says nothing."""
        ...


_METHOD = "/quire.v1.GenerationService/StreamGenerate"
_STATUS = {str(code.value[0]): code.name for code in grpc.StatusCode}


class GrpcTarget:
    """A Quire server, by Quire's client."""

    def __init__(self, address: str, *, api_key: str | None, tls: TLS | bool):
        # What fails shall be counted, not hidden.
        self._client = AsyncClient(address, api_key=api_key, tls=tls, retry=Retry(attempts=1))

    async def __aenter__(self) -> GrpcTarget:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def described(self) -> dict[str, Any]:
        try:
            info = await self._client.model_info()
        except QuireError:  # a stand-in that knows streams alone
            return {}
        return {
            "model": info.name,
            "dtype": info.dtype,
            "max_num_seqs": info.max_running,
            "page_size": info.page_size,
            "pages": info.kv_pages,
        }

    async def stream(
        self, prompt: Sequence[int], output: int, told: Told = lambda hit, first: None
    ) -> AsyncIterator[int]:
        count = 0
        async with self._client.stream(prompt, **_asked(output)) as chunks:
            async for chunk in chunks:
                if chunk.token_ids:
                    count += len(chunk.token_ids)
                    yield count
                if chunk.HasField("usage"):
                    _tell(told, chunk)


class WireTarget:
    """A Quire server on this machine, without keys and TLS, by a client that adds as little as it
    can to what is measured: half a millisecond less than grpc's to a first token."""

    def __init__(self, address: str):
        self._address = address
        self._calls = _Calls()

    async def __aenter__(self) -> WireTarget:
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: self._calls, host.strip("[]"), int(port))
        except OSError as error:
            raise Unavailable(f"{self._address}: {error}") from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._calls.close()

    async def described(self) -> dict[str, Any]:
        return {}

    async def stream(
        self, prompt: Sequence[int], output: int, told: Told = lambda hit, first: None
    ) -> AsyncIterator[int]:
        count = 0
        request = generate_request(prompt, _asked(output))
        async for message in self._calls.messages(request.SerializeToString()):
            chunk = pb.GenerateChunk.FromString(message)
            if chunk.token_ids:
                count += len(chunk.token_ids)
                yield count
            if chunk.HasField("usage"):
                _tell(told, chunk)


class _Calls(Streams):
    """The calls of one target."""

    def __init__(self) -> None:
        super().__init__()
        self._came: dict[int, asyncio.Queue[bytes | QuireError | None]] = {}  # by open call
        self._why_lost = ""

    async def messages(self, request: bytes) -> AsyncIterator[bytes]:
        """Of one call. Raises QuireError."""
        if self._why_lost:
            raise Unavailable(self._why_lost)
        number = self.call(_METHOD, request)
        came = self._came[number] = asyncio.Queue()
        try:
            while (message := await came.get()) is not None:
                if isinstance(message, QuireError):
                    raise message
                yield message
        finally:
            del self._came[number]
            self.cancel(number)

    def came(self, number: int, message: bytes) -> None:
        self._came[number].put_nowait(message)

    def over(self, number: int, headers: dict[str, str]) -> None:
        code = _STATUS.get(headers.get("grpc-status", ""), "UNAVAILABLE")
        why = engine_pb2.Error(code=code, message=headers.get("grpc-message", ""))
        self._came[number].put_nowait(None if code == "OK" else error_of(why))

    def lost(self, why: str) -> None:
        if not self._why_lost:
            self._why_lost = why
            for came in self._came.values():
                came.put_nowait(Unavailable(why))

    def close(self) -> None:
        """Hangs up."""
        self._transport.abort()


def _asked(output: int) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": output, "ignore_eos": True}


def _tell(told: Told, chunk: pb.GenerateChunk) -> None:
    """What the last message says."""
    spent = chunk.timing
    first = spent.queue_seconds + spent.prefill_seconds
    told(chunk.usage.cached_tokens, first if chunk.HasField("timing") else None)
