"""The names that callers gave their unfinished requests, where all frontends meet. Kept by host.py.

A frontend sees to it itself that a name is one call's (frontend/calls.py); a call may be of several
requests, which then all have its name. What it cannot see are other frontends' calls.
"""

from __future__ import annotations

from ...errors import invalid
from ...sched.request import Request
from ..intake import name_in


class Names:
    """Each is one frontend's at a time, among those of a tenant."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], tuple[object, set[str]]] = {}  # whose, request ids
        self._keys: dict[str, tuple[str, str]] = {}  # by request id

    def check(self, request: Request, frontend: object) -> None:
        """Raises InvalidRequest for a name that an unfinished request of another frontend has."""
        name = name_in(request.id)
        held = self._held.get((request.tenant, name))
        if held is not None and held[0] is not frontend:
            raise invalid("request_id", name, "unlike that of every unfinished request")

    def hold(self, request: Request, frontend: object) -> None:
        """Keeps the name of a request that `check` let pass; one without a name has none."""
        if name := name_in(request.id):
            key = self._keys[request.id] = request.tenant, name
            self._held.setdefault(key, (frontend, set()))[1].add(request.id)

    def release(self, request_id: str) -> None:
        """The request has ended, or nobody waits for it. Idempotent."""
        key = self._keys.pop(request_id, None)
        if key is not None:
            ids = self._held[key][1]
            ids.discard(request_id)
            if not ids:
                del self._held[key]
