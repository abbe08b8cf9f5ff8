"""The calls that run: how many, by which names, and how each ends. Owned by the service."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc

from ...errors import Internal, QuireError, invalid
from ..auth.caller import own_tenant
from ..intake import MAX_NAME_LENGTH
from ..telemetry.logs import fields
from .status import end_with

log = logging.getLogger(__name__)


class Calls:
    """Of one frontend.

    Args:
      account: hears of each error that the engine process does not know of, with the id and the
        tenant of its request.

    Attributes:
      running: now.
    """

    def __init__(self, account: Callable[[QuireError, str, str], None]) -> None:
        self._account = account
        self._names: set[tuple[str, str]] = set()  # tenants' own names of unfinished requests
        self.running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Returns when no call runs."""
        await self._idle.wait()

    @asynccontextmanager
    async def run(self, context: grpc.aio.ServicerContext, request: Any) -> AsyncIterator[None]:
        """Counts a call, and ends it with the status that an error stands for.

        Of a fault of ours the caller gets the request's id, and the log what it was.
        """
        self.running += 1
        self._idle.clear()
        try:
            yield
        except QuireError as error:
            if isinstance(error, Internal) and not error.accounted:
                log.error("a call failed: %s", error)
            self._note(error, request)
            await end_with(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            request_id, tenant = _who(request)
            name = request_id or secrets.token_hex(8)
            said = fields(request_id=name, tenant=tenant)
            log.exception("request %r: a call failed", name, extra=said)
            fault = Internal(f"request {name!r}: a fault in Quire; the server's log says more")
            self._note(fault, request)
            await end_with(context, fault)
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    @contextmanager
    def named(self, tenant: str, name: str) -> Iterator[None]:
        """Holds the name a caller gave a request, while it runs.

        Other frontends' calls are unlike each other, too: engine_host/names.py.

        Raises:
          InvalidRequest: another call has it.
        """
        if not name:
            yield
            return
        if (tenant, name) in self._names:
            raise invalid("request_id", name, "unlike that of every unfinished request")
        self._names.add((tenant, name))
        try:
            yield
        finally:
            self._names.discard((tenant, name))

    def _note(self, error: QuireError, request: Any) -> None:
        if not error.accounted:
            self._account(error, *_who(request))


def _who(request: Any) -> tuple[str, str]:
    """The id that a message gives, where its kind has one, and the tenant that it is of; cut where
    they are too long."""
    request_id, said = (getattr(request, name, "") for name in ("request_id", "tenant"))
    tenant = own_tenant()
    return request_id[:MAX_NAME_LENGTH], (said if tenant is None else tenant)[:MAX_NAME_LENGTH]
