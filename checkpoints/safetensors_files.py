"""The tensors of a folder's safetensors files: found, checked and mapped, not read.

Used by params.py. Owns the two layouts (one `model.safetensors`, or shards under an index) and
what can be wrong with the files themselves; which tensors a model needs is names.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy, and so safetensors, the name bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..model.config import Dtype
from .json_fields import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

CHUNK_BYTES = 1 << 20
"""Bytes read at a time. Small enough to be reused from the allocator's free list: eight times as
fast as reading a large tensor at once, whose fresh pages have to be faulted in."""

_DTYPES: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


class WeightFiles:
    """Every tensor of a checkpoint by name. Use as a context manager: it holds the files open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[Path, Any] = {}
        try:
            self._file_of = self._find()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for handle in self._handles.values():
            handle.__exit__(None, None, None)
        self._handles.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def file(self, name: str) -> Path:
        return self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """Bytes on disk, of a tensor whose dtype is supported."""
        return prod(self.shape(name)) * _DTYPE_BYTES[self._slice(name).get_dtype()]

    def dtype(self, name: str) -> Dtype:
        """The dtype of a tensor; refused where Quire does not read it."""
        code = str(self._slice(name).get_dtype())
        if code not in _DTYPES:
            raise CheckpointError(
                f"{self.file(name)}: tensor {name}: got dtype {code}, must be one of "
                f"{', '.join(_DTYPES)} (convert or dequantize the checkpoint first)"
            )
        return _DTYPES[code]

    def chunks(self, name: str, rows_each: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows of a tensor of one or more axes, `rows_each` (about `CHUNK_BYTES`) at a time."""
        shape, view = self.shape(name), self._slice(name)
        row_bytes = max(1, self.nbytes(name) // max(1, shape[0]))
        step = rows_each or max(1, CHUNK_BYTES // row_bytes)
        try:
            for start in range(0, shape[0], step):
                rows = slice(start, min(start + step, shape[0]))
                yield rows, view[rows]
        except SafetensorError as error:
            raise CheckpointError(f"{self.file(name)}: tensor {name}: {error}") from error

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)

    def _find(self) -> dict[str, Path]:
        """Tensor -> file. A single file wins over an index beside it, as in transformers."""
        single = self.folder / SINGLE
        if single.is_file():
            return dict.fromkeys(self._open(single).keys(), single)
        if (self.folder / INDEX).is_file():
            return self._find_sharded(self.folder / INDEX)
        raise CheckpointError(_no_weights(self.folder))

    def _find_sharded(self, index: Path) -> dict[str, Path]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map: must be an object of tensor: file")
        file_of = {name: self._shard(index, name, shard) for name, shard in weight_map.items()}
        held = {file: set(self._open(file).keys()) for file in dict.fromkeys(file_of.values())}
        for name, file in file_of.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{file}: has no tensor {name}, which {index.name} puts there"
                )
        for file, names in held.items():
            for name in sorted(names - file_of.keys()):
                raise CheckpointError(
                    f"{file}: holds tensor {name}, which {index.name} does not name"
                )
        return file_of

    def _shard(self, index: Path, name: str, shard: object) -> Path:
        # Judged by its spelling: in a Hugging Face cache the files are links out of the folder.
        path = PurePosixPath(shard) if isinstance(shard, str) else PurePosixPath("/")
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise CheckpointError(
                f"{index}: weight_map: {name}: got {shard!r}, must be a file inside the folder"
            )
        return self.folder / path

    def _open(self, file: Path) -> Any:
        if not file.is_file():
            raise CheckpointError(
                f"{file}: does not exist, but {INDEX} names it; is the download whole?"
            )
        try:
            handle = safe_open(file, framework="np")
        except SafetensorError as error:
            raise CheckpointError(
                f"{file}: truncated or damaged: {error}; download it again"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be opened: {error}") from error
        self._handles[file] = handle
        return handle


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.glob("*.bin")) + sorted(
        file.name for file in folder.glob("*.pt*")
    )
    if pickles:
        return (
            f"{folder}: has only PyTorch pickles ({pickles[0]}), must have {SINGLE}: a pickle can "
            'run any code. To convert, where the folder is trusted: python -c "from transformers '
            "import AutoModelForCausalLM as M; M.from_pretrained('IN', dtype='auto')"
            ".save_pretrained('OUT')\""
        )
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"; found {', '.join(others[:3])}" if others else ""
    return f"{folder}: has no weights, must have {SINGLE} or {INDEX}{found}"
