"""Room on disk, asked for before something large is written. Used by convert.py and hub.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import CheckpointError

_MARGIN = 64 << 20
"""Bytes left free beside what is written: small files, and what else the machine does meanwhile."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises CheckpointError where the disk of `folder` (which need not exist yet) is too small."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed + _MARGIN > free:
        raise CheckpointError(
            f"{what} needs {human_bytes(needed + _MARGIN)} of disk, {human_bytes(free)} free at "
            f"{folder}"
        )


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
