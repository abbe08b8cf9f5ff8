"""Keeps what a process knows of API keys as the file says: frontends, and the engine process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ..watched_file import LOOK_EVERY, stamp, watch
from .key_file import KeyTable, read_keys


def follow_keys(
    path: str, use: Callable[[KeyTable], None], look_every: float = LOOK_EVERY
) -> asyncio.Task[None]:
    """Reads the file now, and again on the event loop whenever it changes, until cancelled.

    Args:
      use: called with what it says, at once and after each change.
      look_every: seconds between looks at it.

    Raises:
      InvalidConfig: the file cannot be read. Later on that is logged, and changes nothing.
    """
    seen = stamp(path)
    use(read_keys(path))
    return asyncio.ensure_future(watch(path, read_keys, use, seen, look_every))
