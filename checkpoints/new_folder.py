"""A folder that appears whole or not at all: written under another name, renamed at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from .manifest import MANIFEST, partial_name
from .reporting import Reporter


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raises CheckpointError where `target` cannot become a folder made from `source`."""
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent}: does not exist, must be a folder to write into")
    here = source.resolve()
    if target.resolve() == here or target.resolve() in here.parents:
        raise CheckpointError(f"{target}: holds the source {source}, must be another folder")
    if not (target.exists() or target.is_symlink()) or _is_empty(target):
        return
    if target.is_symlink() or not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target}: is not a converted folder, which --force would replace, must be a new or "
            "an empty folder"
        )
    if not force:
        raise CheckpointError(f"{target}: exists already; --force replaces a converted folder")


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink() and not any(target.iterdir())


@contextmanager
def new_folder(target: Path, reporter: Reporter) -> Iterator[tuple[Path, Callable[[], None]]]:
    """An empty folder to write into, and the function that makes it `target`.

    What is there when an error ends the block is removed. A killed process leaves it behind under
    its temporary name; the next one with the same target says so and starts it anew.
    """
    folder = target.with_name(partial_name(target.name))
    try:
        folder.mkdir(exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder}: another conversion is writing it") from error
        if any(folder.iterdir()):
            reporter.note(f"{folder} was left by a conversion that was cut off: begun anew")
            _empty(folder)
        try:
            yield folder, lambda: _put_in_place(folder, target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _put_in_place(folder: Path, target: Path) -> None:
    """Renames; a folder that was there makes way first, and is gone after."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)
