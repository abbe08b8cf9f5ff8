"""How a frontend talks to an engine, wherever that runs; and the way to one in this process.

`EngineLink` is all that serving/grpc_server.py knows of engines. Its calls are made on the
frontend's event loop and never block it.

    engine thread:  Engine --Mailbox.deliver(outputs of a step)--> event loop: a Pending a request
    handler:        with link.open(request) as pending: ... await pending.take()
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from ..sched.engine import Engine
from ..sched.request import FinishReason, Request, RequestOutput
from ..sched.stats import EngineStats
from .pending import Pending


class EngineLink(Protocol):
    """Of one engine; a new engine gets a new link."""

    @property
    def healthy(self) -> bool:
        """Whether the engine takes requests."""
        ...

    def open(self, request: Request) -> AbstractContextManager[Pending]:
        """Submits a request; its outputs come to what is yielded.

        That a request is refused may be raised here, or come as an output with an error. Leaving
        the block forgets the request but does not end it: who leaves early calls `finish` before.

        Raises:
          QuireError: it is refused.
        """
        ...

    def finish(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        choice: int | None = None,
    ) -> None:
        """Ends a request early, or one of its choices; does nothing if that ended already."""
        ...

    async def stats(self) -> EngineStats:
        """The engine's counters as they are now.

        Raises:
          Unavailable: the engine is gone.
        """
        ...

    async def close(self, why: str) -> None:
        """Ends what is open with Unavailable, and takes no more."""
        ...


class Mailbox:
    """Brings the engine thread's outputs to the event loop, once per step."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._pending: dict[str, Pending] = {}

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Called on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._sort, outputs)
        except RuntimeError:
            # The loop was closed under a running engine; then nobody is left to tell.
            if not self._loop.is_closed():
                raise

    def _sort(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            pending = self._pending.get(output.request_id)
            if pending is not None:  # else the caller has gone
                pending.put(output)

    @contextmanager
    def pending(self, request_id: str) -> Iterator[Pending]:
        """Where the outputs of a request go that is about to be submitted."""
        pending = self._pending[request_id] = Pending(request_id)
        try:
            yield pending
        finally:
            del self._pending[request_id]


class LocalLink:
    """An `EngineLink` to an engine in this process.

    Args:
      engine: started; delivers to `mailbox`.
      mailbox: of the event loop that the link is used on.
    """

    def __init__(self, engine: Engine, mailbox: Mailbox):
        self._engine, self._mailbox = engine, mailbox

    @property
    def healthy(self) -> bool:
        return self._engine.healthy

    @contextmanager
    def open(self, request: Request) -> Iterator[Pending]:
        with self._mailbox.pending(request.id) as pending:
            self._engine.submit(request)
            yield pending

    def finish(
        self,
        request_id: str,
        reason: FinishReason = FinishReason.ABORT,
        choice: int | None = None,
    ) -> None:
        self._engine.finish(request_id, reason, choice)

    async def stats(self) -> EngineStats:
        return self._engine.stats()
