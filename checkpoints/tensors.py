"""A checkpoint's tensors by name, whichever kind of folder holds them. Used by params.py and
convert.py.

Both kinds keep Hugging Face's names and unfused tensors, so everything above this page is the same
for both: names.py says which tensors a model needs, and params.py fuses them while it loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from ..model.config import Dtype
from .manifest import is_converted
from .safetensors_files import WeightFiles


class Tensors(Protocol):
    """Read-only; a context manager, because it may hold files open."""

    folder: Path

    def __enter__(self) -> Tensors: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def file(self, name: str) -> Path:
        """Where the tensor lies, for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def nbytes(self, name: str) -> int:
        """Bytes of its values."""
        ...

    def dtype(self, name: str) -> Dtype:
        """Raises CheckpointError for one that Quire does not read."""
        ...

    def chunks(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """Its rows in order, a bounded number of bytes at a time."""
        ...


def open_tensors(folder: Path) -> Tensors:
    """The tensors of a checkpoint folder of either kind."""
    if is_converted(folder):
        from .orbax_tensors import OrbaxTensors  # tensorstore takes a while to import

        return OrbaxTensors(folder)
    return WeightFiles(folder)
