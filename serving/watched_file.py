"""A file that is read again when it changes, off the event loop. For API keys (serving/auth)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import InvalidConfig

log = logging.getLogger(__name__)

LOOK_EVERY = 2.0
"""Seconds between looks."""

Stamp = tuple[int, ...] | None
Value = TypeVar("Value")


def stamp(path: str | Path) -> Stamp:
    """Differs when the file has changed; None where it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    # The change time tells of a mode or an owner that was mended.
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino


async def watch(
    path: str | Path,
    read: Callable[[str | Path], Value],
    use: Callable[[Value], None],
    seen: Stamp,
    look_every: float = LOOK_EVERY,
) -> None:
    """Runs until cancelled. What a file that cannot be read said before stays in force.

    Args:
      read: gives what is in the file, or raises InvalidConfig; called on another thread.
      use: called on the event loop with what was read.
      seen: the file's stamp before what is in force was read.
      look_every: seconds between looks.
    """
    while True:
        await asyncio.sleep(look_every)
        now = await asyncio.to_thread(stamp, path)
        if now == seen:
            continue
        seen = now
        try:
            value = await asyncio.to_thread(read, path)
            use(value)
        except InvalidConfig as error:
            log.error("%s; what it said before stays in force", error)
        except Exception:  # must not end the watch, or the next change would go unseen
            log.exception("%s: cannot be read; what it said before stays in force", path)
        else:
            log.info("%s was read again", path)
