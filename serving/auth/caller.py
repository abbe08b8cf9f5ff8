"""Which tenant a call is of: set by the interceptor, asked by whoever handles the call.

A context variable, because grpc.aio runs a call's interceptors and its handler in one task.
"""

from __future__ import annotations

from contextvars import ContextVar

from ...errors import PermissionDenied

_tenant: ContextVar[str | None] = ContextVar("tenant", default=None)


def set_tenant(name: str) -> None:
    """The call in progress is of this tenant, whatever it says itself."""
    _tenant.set(name)


def own_tenant() -> str | None:
    """The tenant of the call in progress; None without API keys."""
    return _tenant.get()


def tenant_for(asked: str) -> str:
    """The tenant of the call in progress; without API keys, the one it names.

    Raises:
      PermissionDenied: it names another one than its key is of.
    """
    own = _tenant.get()
    if own is None:
        return asked
    if asked and asked != own:
        raise PermissionDenied(
            f"tenant: got {asked[:64]!r}, must be empty or {own!r}, the tenant of the API key"
        )
    return own
