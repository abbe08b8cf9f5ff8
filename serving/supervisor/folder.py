"""The folder of a server's sockets, and what servers that were killed left of theirs.

Used by supervisor.py. A server holds a lock on its folder as long as it lives, however it ends, so
whoever gets the lock knows that the folder is nobody's. (It also keeps systemd-tmpfiles away.)
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "quire-serve-"

_LONGEST = 80
"""Characters that a folder's path may have before the 8 that are drawn: a socket's has at most 103
everywhere."""


_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can look into, with a path short enough for sockets, until the
    block ends. Those of servers that were killed go first."""
    base = Path(tempfile.gettempdir())
    if len(str(base / PREFIX)) > _LONGEST:
        base = Path("/tmp")
    remove_stale(base)
    folder, lock = _made(base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale(base: Path) -> None:
    """Removes the folders of this user's servers that live no more."""
    for folder in base.glob(f"{PREFIX}*"):
        with suppress(OSError), _opened(folder) as lock:  # or it is another's, or gone
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                log.info("removed %s, of a server that was killed", folder)


def _made(base: Path) -> tuple[Path, int]:
    """A new folder, and the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        # Until it is locked, a server that starts just now may take it for stale: then once more.
        with suppress(FileNotFoundError), _opened(folder) as opened:
            with suppress(OSError):  # no locks here; then nobody gets one to remove it, either
                fcntl.flock(opened, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(opened), folder.stat()):
                return folder, os.dup(opened)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    opened = os.open(folder, _OPEN)
    try:
        yield opened
    finally:
        os.close(opened)
