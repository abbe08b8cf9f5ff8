"""Servers that a load can be sent to, and the first: Quire over gRPC. Used by serve.py and load.py.

All are asked for the same: token ids in, a fixed number of tokens out, greedy, end of sequence
ignored, streamed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from ...client import TLS, AsyncClient, Retry
from ...errors import QuireError

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


class GrpcTarget:
    """A Quire server."""

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
        call = self._client.stream(prompt, temperature=0.0, max_tokens=output, ignore_eos=True)
        async with call as chunks:
            async for chunk in chunks:
                if chunk.token_ids:
                    count += len(chunk.token_ids)
                    yield count
                if chunk.HasField("usage"):
                    spent = chunk.timing
                    first = spent.queue_seconds + spent.prefill_seconds
                    told(chunk.usage.cached_tokens, first if chunk.HasField("timing") else None)
