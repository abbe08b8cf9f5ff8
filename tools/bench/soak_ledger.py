"""What became of each request of a soak: what its caller saw, held against the server's log.

The server writes one line for each request that it accepted and that ended, and one for each that
it refused. Used by soak.py; soak_callers.py notes what callers see.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from enum import IntEnum

_LINE = re.compile(r"\] request (ended|refused) request_id=([^\s/]+)\S* .*finish_reason=(\w+)")
"""To a caller's id the server may add a slash and one of its own."""


class Seen(IntEnum):
    """The most that a caller saw of its request."""

    NOTHING = 0  # it may never have arrived
    REFUSED = 1
    BEGUN = 2  # something of an answer, so it was accepted
    WHOLE = 3


class Ledger:
    """All requests of a run, by id."""

    def __init__(self) -> None:
        self._seen: dict[str, Seen] = {}

    def note(self, request_id: str, seen: Seen) -> None:
        self._seen[request_id] = max(seen, self._seen.get(request_id, Seen.NOTHING))

    def count(self, seen: Seen) -> int:
        """Requests of which callers saw at least so much."""
        return sum(most >= seen for most in self._seen.values())

    def disagreements(self, log: Iterable[str]) -> list[str]:
        """How the server's account differs from the callers': an accepted request must end once,
        as its caller saw it, and no other may be there.

        Args:
          log: the server's lines, all of them.
        """
        ended, refused = Counter[str](), Counter[str]()
        reasons: dict[str, str] = {}
        for line in log:
            if found := _LINE.search(line):
                how, request_id, reason = found.groups()
                (ended if how == "ended" else refused)[request_id] += 1
                reasons[request_id] = reason
        said = [f"{id}: nobody asked" for id in {**ended, **refused} if id not in self._seen]
        for id, seen in self._seen.items():
            times = f"{id}: ended {ended[id]} times, refused {refused[id]} times"
            if ended[id] + refused[id] > 1 or (seen >= Seen.BEGUN and ended[id] != 1):
                said.append(f"{times}; its caller saw {seen.name}")
            elif seen is Seen.WHOLE and reasons[id] not in ("stop", "length"):
                said.append(f"{id}: ended by {reasons[id]}; its caller saw {seen.name}")
            elif seen is Seen.REFUSED and ended[id]:
                said.append(f"{times}; its caller saw {seen.name}")
        return said
