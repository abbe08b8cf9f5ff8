"""The tensors of a converted folder: an Orbax checkpoint with one zarr array per tensor.

Any program restores it whole with `orbax.checkpoint.PyTreeCheckpointer().restore(folder/weights)`.
Quire writes and reads it tensor by tensor, in blocks of rows, through TensorStore, which is what
Orbax stores arrays with: a save or restore of the whole tree would hold all of it. Blocks are not
compressed (bfloat16 weights shrink by a fifth, and then load at the speed of one core), and each is
a file of its own, so that a device may read its rows alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the name bfloat16
import numpy as np
import tensorstore as ts

from ..errors import CheckpointError
from ..model.config import DTYPES, Dtype
from .manifest import WEIGHTS, Manifest, read_manifest

MIN_BLOCK, MAX_BLOCK = 1 << 20, 16 << 20
"""Bytes of a stored block: a quarter of the tensor, within these bounds (a single row may be
longer). Writing holds four or five blocks at once, so about one tensor of the largest kind."""

Blocks = Callable[[int], Iterator[tuple[slice, np.ndarray]]]


class OrbaxTensors:
    """Every tensor of a converted folder by name; see tensors.py for the methods."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)

    def __enter__(self) -> OrbaxTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.tensors)

    def file(self, name: str) -> Path:
        return self.folder / WEIGHTS / name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.manifest.tensors[name].shape

    def nbytes(self, name: str) -> int:
        return int(np.prod(self.shape(name))) * np.dtype(self.dtype(name)).itemsize

    def dtype(self, name: str) -> Dtype:
        dtype = self.manifest.tensors[name].dtype
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file(name)}: tensor {name}: got dtype {dtype}, must be one of "
                f"{', '.join(DTYPES)}"
            )
        return dtype

    def chunks(self, name: str) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows of a tensor, a stored block at a time."""
        try:
            array = ts.open(_spec(self.file(name)), open=True, read=True, context=_CONTEXT).result()
            if array.shape != self.shape(name) or array.dtype.name != self.dtype(name):
                raise CheckpointError(
                    f"{self.file(name)}: holds {array.dtype.name}{array.shape}, must be "
                    f"{self.dtype(name)}{self.shape(name)}"
                )
            block = array.chunk_layout.read_chunk.shape
            length, step = array.shape[0], (block and block[0]) or array.shape[0]
            for start in range(0, length, step):
                rows = slice(start, min(start + step, length))
                yield rows, array[rows].read().result()
        except (ValueError, OSError) as error:  # TensorStore's own
            raise CheckpointError(
                f"{self.file(name)}: tensor {name}: cannot be read: {error}"
            ) from error


# One block is under way at a time; more threads would each keep memory of their own for nothing.
_CONTEXT = ts.Context({"file_io_concurrency": {"limit": 1}, "data_copy_concurrency": {"limit": 1}})


def _spec(folder: Path) -> dict[str, Any]:
    store = {"driver": "file", "path": f"{folder.absolute()}/"}
    return {"driver": "zarr", "kvstore": store}


class Leaf:
    """A tensor that is yet to be written: stands for an array in the tree that Orbax saves.

    Attributes:
      shape, dtype: of the array to be.
      blocks: given a number of rows, yields (rows, values) in order, so many rows at a time and
        in this dtype.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, blocks: Blocks) -> None:
        self.shape, self.dtype, self.blocks = shape, dtype, blocks

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)


def write_tensors(folder: Path, leaves: dict[str, Leaf]) -> None:
    """Saves `leaves` as an Orbax checkpoint at `folder`/weights, in their order, one at a time."""
    import orbax.checkpoint as ocp

    class WriteLeaf(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
        """Saves a Leaf the way that Orbax's own handler of arrays finds it again."""

        async def serialize(
            self, values: Sequence[Leaf], infos: Sequence[Any], args: Any = None
        ) -> Sequence[Any]:
            for leaf, info in zip(values, infos, strict=True):
                await info.await_path_creation()
                await _write(Path(info.parent_dir) / info.name, leaf)
            return []

    with _quiet():
        registry = ocp.type_handlers.create_type_handler_registry((Leaf, WriteLeaf()))
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, use_compression=False, type_handler_registry=registry
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((folder / WEIGHTS).absolute(), args=ocp.args.PyTreeSave(leaves))


async def _write(folder: Path, leaf: Leaf) -> None:
    row_bytes = leaf.nbytes // leaf.shape[0]
    block_bytes = min(MAX_BLOCK, max(MIN_BLOCK, leaf.nbytes // 4))
    rows = min(leaf.shape[0], max(1, block_bytes // row_bytes))
    array = ts.open(
        _spec(folder),
        create=True,
        context=_CONTEXT,
        dtype=leaf.dtype.name,
        shape=leaf.shape,
        chunk_layout=ts.ChunkLayout(chunk_shape=(rows, *leaf.shape[1:])),
        codec=ts.CodecSpec({"driver": "zarr", "compressor": None}),
    ).result()
    for where, values in leaf.blocks(rows):
        # Waits until it is on disk: two blocks at once would be two in memory.
        array[where].write(values, can_reference_source_data_indefinitely=True).result()
        del values  # before the next one is read
        await asyncio.sleep(0)  # where an interrupt ends it, with nothing under way


@contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns of what this format leaves out on purpose (OCDBT, shardings)."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
