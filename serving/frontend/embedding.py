"""The requests of a call of Embed, followed to their ends. Used by the service's method."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence

from ...errors import Overloaded, QuireError
from ...sched.request import Request, RequestOutput
from ..vectors import Embedding
from .engine_link import EngineLink

_AT_ONCE = 128
"""Requests of one call in the engine at once: enough to fill its steps, without filling its queue
however long the list of inputs is."""

_LEAST_WAIT = 0.01
"""Seconds until what was refused with nothing under way is tried again, whatever the refusal says.
"""


async def embed_all(link: EngineLink, requests: Sequence[Request]) -> list[RequestOutput]:
    """The outputs that hold the requests' embeddings, in order.

    One that finds no room, in the queue or within its tenant's limits, waits for another of them to
    end; where none is under way, for as long as the refusal says. The call is refused only while
    nothing of it was computed, and only then does that count: engine_host/host.py says nothing of
    the others to log and metrics. To refuse it later would throw away what its tenant has paid for,
    and a call of more inputs than a minute allows would do so each time that it is tried again.

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
        self._has_some = False  # an embedding, or more
        self._refused: deque[asyncio.Future[None]] = deque()  # those that wait, longest first

    async def embed(self, request: Request) -> RequestOutput:
        async with self._room:
            while True:
                self._active += 1
                try:
                    output = await self._once(request)
                    self._has_some = True
                    self._wake()
                    return output
                except Overloaded as refusal:
                    is_alone, wait = self._active == 1, max(refusal.retry_after, _LEAST_WAIT)
                    if is_alone and not self._has_some:
                        # The engine process has kept no account of it: most are tried again.
                        refusal.accounted = False
                        raise
                finally:
                    self._active -= 1
                if is_alone:  # nothing is under way that could wake it
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait):
                            await self._link.lost()  # then it is refused at once, and says why
                    continue
                again: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._refused.append(again)
                await again

    def _wake(self) -> None:
        """One takes the place that became free, another sees whether there is more room by now."""
        for _ in range(min(2, len(self._refused))):
            again = self._refused.popleft()
            if not again.done():  # by who gave the call up
                again.set_result(None)

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
