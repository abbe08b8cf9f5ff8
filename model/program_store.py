"""Compiled programs on disk, for the next start. Called by model/compile.py; owns their folder.

An entry is found by its facts: everything that may change what XLA makes of a program, gathered
without tracing it (`environment`, and `Programs.facts`). What is found is distrusted all the same:

  file = MAGIC, SHA-256 of the rest, length of the header (8 bytes), header (JSON), programs' bytes

The checksum must match, and the header must repeat the facts word for word. What does not is
removed and made anew. Loading a program runs code from the file, and no checksum helps against who
may write there: folder and file must belong to this user and be writable by nobody else. Files
appear whole (written aside, then renamed), so that several processes may start at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import jax

from ..environment import compiler_environment
from .mesh import Mesh

_KIND = b"quire program "
MAGIC = _KIND + b"1\n"
_SUFFIX = ".program"
_DIGEST_BYTES = hashlib.sha256().digest_size

Facts = Mapping[str, str]

_MAKERS = re.compile(r"(jax|jaxlib|flax|libtpu)$|jax-cuda|jax-rocm|nvidia-")
"""Names of packages that have a part in a program."""

_NOT_OF_PROGRAMS = (
    "jax_compilation_cache",
    "jax_persistent_cache",
    "jax_log",
    "jax_platforms",
    "jax_pjrt_client_create_options",  # how large the memory pool is
)
"""JAX settings, by how they begin, that change no program."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored program.

    Attributes:
      figures: what is known of it, such as the bytes of its temporaries.
      body: the program.
    """

    figures: dict[str, int]
    body: bytes


class ProgramStore:
    """A folder of programs, bounded in size.

    Args:
      folder: must be private (`make_private`).
      limit: bytes; `prune` keeps to that.
      within: the folder whose files count, and may be removed; `folder` or one above it.
    """

    def __init__(self, folder: Path, limit: int, within: Path | None = None) -> None:
        self.folder, self.limit, self._within = folder, limit, within or folder
        self.problems: list[str] = []
        self._discarded: set[Path] = set()  # not to be used, though perhaps not removed

    @property
    def tuning(self) -> Path:
        """A folder for what XLA learns about kernels while it compiles."""
        folder = self.folder / "tuning"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def get(self, facts: Facts) -> Entry | None:
        """What was stored under these facts. A file that is not whole or not ours is removed."""
        path = self._path(facts)
        if path in self._discarded:
            return None
        try:
            with open(path, "rb") as file:
                _check_private(os.fstat(file.fileno()), path)
                data = file.read()
            entry = _unpack(data, facts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.discard(facts, str(error))
            return None
        with contextlib.suppress(OSError):  # a store that may only be read
            os.utime(path)  # least recently used goes first
        return entry

    def put(self, facts: Facts, body: bytes, figures: Mapping[str, int]) -> None:
        """Stores a program; a disk that is full costs the next start time, and no more."""
        try:
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            try:
                with open(handle, "wb") as file:
                    file.write(_pack(facts, body, figures))
                os.replace(name, self._path(facts))
                self._discarded.discard(self._path(facts))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            self.problems.append(f"a compiled program was not stored: {error}")

    def discard(self, facts: Facts, why: str) -> None:
        """Removes an entry that cannot be used."""
        path = self._path(facts)
        self.problems.append(f"a stored program is compiled anew: {path.name[:12]}: {why}")
        self._discarded.add(path)
        with contextlib.suppress(OSError):
            path.unlink()

    def prune(self) -> None:
        """Removes what was used least recently, until the files keep to the limit."""
        files = []
        for path in self._within.rglob("*"):
            with contextlib.suppress(OSError):
                found = path.stat()
                if stat.S_ISREG(found.st_mode):
                    files.append((max(found.st_mtime, found.st_atime), found.st_size, path))
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                excess -= size

    def _path(self, facts: Facts) -> Path:
        return self.folder / (hashlib.sha256(_text(facts)).hexdigest() + _SUFFIX)


def make_private(folder: Path) -> None:
    """Makes `folder` where there is none.

    Raises:
      PermissionError: others may write there, or it is another user's.
      OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_private(os.stat(folder), folder)


def environment(mesh: Mesh) -> dict[str, str]:
    """All that programs depend on besides their model and sizes: software, devices and flags.

    Quire's own part is the text of this folder, so that no change of it needs to be remembered.
    """
    devices, client = mesh.devices, mesh.devices[0].client
    kept = {
        name: str(value)
        for name, value in jax.config.values.items()
        if not name.startswith(_NOT_OF_PROGRAMS)
    }
    return {
        "source": _source_digest(),
        "versions": ", ".join(_versions()),
        "backend": f"{client.platform} {client.platform_version}",
        "devices": "; ".join(_device(device) for device in devices),
        "processes": str(jax.process_count()),
        "mesh": str(mesh.abstract),
        "host": _cpu_features() if mesh.platform == "cpu" else "",
        "jax settings": json.dumps(kept, sort_keys=True),
        "compiler settings": json.dumps(compiler_environment(), sort_keys=True),
    }


def _check_private(found: os.stat_result, path: Path) -> None:
    if found.st_uid != os.geteuid():
        raise PermissionError(
            f"{path}: belongs to user {found.st_uid}, must be user {os.geteuid()}'s: "
            "loading a program runs code from it"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path}: others may write there (mode {stat.S_IMODE(found.st_mode):o}), and loading a "
            f"program runs code from it; chmod go-w {path}"
        )


def _text(facts: Facts) -> bytes:
    return json.dumps(dict(facts), sort_keys=True).encode()


def _pack(facts: Facts, body: bytes, figures: Mapping[str, int]) -> bytes:
    header = json.dumps({"facts": dict(facts), "figures": dict(figures)}).encode()
    rest = len(header).to_bytes(8, "big") + header + body
    return MAGIC + hashlib.sha256(rest).digest() + rest


def _unpack(data: bytes, facts: Facts) -> Entry:
    """Raises ValueError for what is not an entry of these facts, whole."""
    start = len(MAGIC) + _DIGEST_BYTES
    if not data.startswith(_KIND) or len(data) < start:
        raise ValueError("it is damaged")
    if not data.startswith(MAGIC):
        raise ValueError("it is of another version")
    if hashlib.sha256(data[start:]).digest() != data[len(MAGIC) : start]:
        raise ValueError("it is damaged")
    end = start + 8 + int.from_bytes(data[start : start + 8], "big")
    header = json.loads(data[start + 8 : end])
    if header["facts"] != dict(facts):
        raise ValueError("it was made from something else")
    return Entry(header["figures"], data[end:])


@cache
def _versions() -> tuple[str, ...]:
    """Of what makes programs, and of the libraries whose kernels they choose among and call."""
    found = {(d.name.lower(), d.version) for d in distributions() if _MAKERS.match(d.name.lower())}
    return tuple(sorted(f"{name} {number}" for name, number in found))


def _device(device: Any) -> str:
    traits = ("id", "device_kind", "coords", "core_on_chip", "compute_capability", "slice_index")
    return ", ".join(f"{trait} {getattr(device, trait, None)}" for trait in traits)


@cache
def _source_digest() -> str:
    """Of every file of quire/model: what traces programs, and the tables it reads."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _cpu_features() -> str:
    """XLA compiles for the very CPU; its code may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()
