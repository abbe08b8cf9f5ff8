"""Changes a small file: one writer at a time, readers see it before or after. For key_file.py."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits until no other process has the file, which is made (empty, of mode 0600) where there is
    none, and has it until the block ends. Raises OSError.

    The lock is on the file itself, so nothing is left lying beside it; who waited for it may find
    that `replace` has put another one in its place, and then waits for that.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(handle), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:
                yield
                return
        finally:
            os.close(handle)


def replace(path: Path, text: str) -> None:
    """Puts another file in its place, with the owner, group, mode and access lists of the one that
    is there; mode 0600 where there is none.

    Raises:
      OSError: it cannot be written, or who writes it may not give it to its owner.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if path.exists():
                _be_like(path, Path(name))
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _be_like(old: Path, new: Path) -> None:
    was, now = os.stat(old), os.stat(new)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        try:
            os.chown(new, was.st_uid, was.st_gid)
        except PermissionError as error:
            who = f"it belongs to user {was.st_uid}, group {was.st_gid}"
            raise PermissionError(
                error.errno, f"{who}, and only that user or root can write it as theirs"
            ) from error
    shutil.copystat(old, new)
    os.utime(new)  # it has changed, whatever the other one's times were
