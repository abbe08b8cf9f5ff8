"""The requests of a call of Embed, followed to their ends. Used by the service's method."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ...errors import Overloaded, QuireError
from ...sched.request import Request, RequestOutput
from ..vectors import Embedding
from .engine_link import EngineLink

_AT_ONCE = 128
"""Requests of one call in the engine at once: enough to fill its steps, without filling its queue
however long the list of inputs is."""


async def embed_all(link: EngineLink, requests: Sequence[Request]) -> list[RequestOutput]:
    """The outputs that hold the requests' embeddings, in order.

    One that finds no room, in the queue or among those its tenant may have at once, waits for
    another of them to end, and is refused only where none is under way.

    Raises:
      QuireError: one of them failed, or was refused; the others have been ended.
    """
    call = _Call(link)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call.embed(request)) for request in requests]
    except BaseExceptionGroup as failures:
        # One says why; the rest were cancelled for it, or failed with it.
        known = [error for error in failures.exceptions if isinstance(error, QuireError)]
        raise (known or failures.exceptions)[0] from None
    return [task.result() for task in tasks]


class _Call:
    """The requests of one call, in the engine as far as there is room for them."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._active = 0
        self._ended = asyncio.Event()  # of the next one that ends well; then another event is

    async def embed(self, request: Request) -> RequestOutput:
        async with self._room:
            while True:
                self._active += 1
                try:
                    output = await self._once(request)
                    self._ended.set()
                    self._ended = asyncio.Event()
                    return output
                except Overloaded:
                    if self._active == 1:
                        raise
                    ended = self._ended
                finally:
                    self._active -= 1
                await ended.wait()

    async def _once(self, request: Request) -> RequestOutput:
        follower = Embedding()
        with self._link.open(request) as pending:
            try:
                while True:
                    for output in await pending.take():
                        if follower.push(output) is not None:
                            return output
            finally:
                for reason, choice in follower.news(leaving=True):
                    self._link.finish(request.id, reason, choice)
