"""Folders of sockets: one a server, gone with it, or else with the next server's start."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from quire.serving.supervisor import folder as module
from quire.serving.supervisor.folder import PREFIX, private_folder, remove_stale


def swap(monkeypatch: pytest.MonkeyPatch, library: ModuleType, **changes: Any) -> None:
    """Changes what the module under test finds in a library, and nobody else in this process."""
    copy = SimpleNamespace(**{**vars(library), **changes})
    monkeypatch.setattr(module, library.__name__, copy)


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where folders are made; its path is short, as that of sockets must be."""
    with tempfile.TemporaryDirectory() as made:
        swap(monkeypatch, tempfile, gettempdir=lambda: made)
        yield Path(made)


def left(base: Path, name: str = "killed") -> Path:
    """What a server left that was killed."""
    folder = base / f"{PREFIX}{name}"
    folder.mkdir(mode=0o700)
    (folder / "engine").touch()
    return folder


def test_a_server_has_a_folder_of_its_own_while_it_lives(base: Path) -> None:
    with private_folder() as folder:
        assert folder.parent == base and stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "engine").touch()
    assert not list(base.iterdir())


def test_what_a_killed_server_left_goes_with_the_next_start(base: Path) -> None:
    stale = left(base)
    with private_folder() as folder:
        assert list(base.iterdir()) == [folder] != [stale]


def test_a_living_servers_folder_stays(base: Path) -> None:
    with private_folder() as first, private_folder() as second:
        assert set(base.iterdir()) == {first, second}
        remove_stale(base)
        assert set(base.iterdir()) == {first, second}


def test_nothing_else_is_touched(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    (base / f"{PREFIX}link").symlink_to(elsewhere)
    (base / f"{PREFIX}file").touch()
    (base / "quire-startup-x").mkdir()
    before = sorted(base.rglob("*"))
    remove_stale(base)
    assert sorted(base.rglob("*")) == before


def test_another_users_folder_stays(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = left(base)
    swap(monkeypatch, os, getuid=lambda: theirs.stat().st_uid + 1)
    remove_stale(base)
    assert theirs.exists()


def test_a_folder_that_is_taken_for_stale_while_it_is_made_is_made_anew(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a server that starts between its making and its lock, before or after it is opened."""
    lock, make, made = fcntl.flock, tempfile.mkdtemp, list[str]()

    def swept_before_it_is_opened(**how: Any) -> str:
        made.append(make(**how))
        if len(made) == 1:
            remove_stale(base)
        return made[-1]

    def swept_before_it_is_locked(fd: int, how: int) -> None:
        if how == fcntl.LOCK_EX and len(made) == 2:
            shutil.rmtree(made[-1])
        lock(fd, how)

    here = {"gettempdir": lambda: str(base), "mkdtemp": swept_before_it_is_opened}
    swap(monkeypatch, tempfile, **here)
    swap(monkeypatch, fcntl, flock=swept_before_it_is_locked)
    with private_folder() as folder:
        assert len(made) == 3 and str(folder) == made[-1] and folder.exists()
        remove_stale(base)
        assert folder.exists()


def test_without_locks_nothing_is_removed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(37, "No locks available")

    swap(monkeypatch, fcntl, flock=none)
    stale = left(base)
    with private_folder() as folder:
        assert folder.exists() and stale.exists()


@pytest.mark.parametrize("length", [60, 67, 68, 69, 75, 90, 120])
def test_sockets_fit_however_long_the_paths_are(
    base: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    deep = base / ("x" * (length - len(str(base)) - 1))
    deep.mkdir()
    swap(monkeypatch, tempfile, gettempdir=lambda: str(deep))
    with private_folder() as folder, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "engine"))
        assert len(str(folder / "engine")) <= 103
        assert folder.parent == (deep if length <= 67 else Path("/tmp"))
