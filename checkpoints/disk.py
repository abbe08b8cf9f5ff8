"""Room on disk, asked for before something large is written. Used by convert.py and hub.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import CheckpointError
from ..model.memory import human_bytes

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
