"""How a frontend talks to an engine: all that serving/frontend/service.py knows of one.

    with link.open(request) as pending:
        ... await pending.take()

Made by serving/frontend/remote_link.py. Its calls come from the frontend's event loop, which they
never block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from ...errors import QuireError
from ...sched.request import FinishReason, Request
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

    def refused(self, error: QuireError, request_id: str, tenant: str) -> None:
        """A call ended with an error that did not come from here; for the service's accounts."""
        ...

    def make_way(self) -> None:
        """A new call is on its way to `open`: what wakes others' readers waits a moment."""
        ...

    async def lost(self) -> None:
        """Returns when it takes no more: the engine is gone, or `close` was called."""
        ...

    async def close(self, why: str) -> None:
        """Ends what is open with Unavailable, and takes no more."""
        ...
