"""Hugging Face folder -> a converted folder (manifest.py), nothing lost. Run by `quire convert`.

Tensors go over block by block, so the host holds a few blocks whatever the model's size, and come
out under the same names: unfused, for any mesh. Buffers that follow from config.json, which nobody
reads, stay behind and are named. Every other file of the model goes over as it is.
All is written under a temporary name, read back, and renamed when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from .. import __version__
from ..errors import CheckpointError
from .disk import require_space
from .folder import Checkpoint
from .json_fields import read_json
from .manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    digest_of,
    is_converted,
    new_digest,
    write_manifest,
)
from .names import is_harmless, parameters
from .new_folder import check_target, new_folder
from .orbax_tensors import Leaf, OrbaxTensors, write_tensors
from .params import check_tensors, numpy_dtype, refuse_overflow
from .reporting import Reporter, Update
from .safetensors_files import INDEX, WeightFiles

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5",
            ".msgpack", ".onnx", ".onnx_data", ".tflite", ".npz")  # fmt: skip
_FOLDERS = ("additional_chat_templates",)
"""Folders of a checkpoint that belong to its model. Others hold other forms of it, or leftovers of
its training, and are named instead."""


def convert(
    source: Path,
    target: Path,
    reporter: Reporter,
    *,
    origin: str = "",
    dtype: str | None = None,
    force: bool = False,
    ignore_fields: Collection[str] = (),
) -> Manifest:
    """Converts the checkpoint in `source` into the new folder `target`.

    Args:
      source: a folder in Hugging Face form.
      target: where the converted folder is to be.
      reporter: hears of progress and of what is left out.
      origin: what the user called the source; the manifest keeps it.
      dtype: what to cast the weights to; None leaves every tensor as it is.
      force: replace `target`, if that is a converted folder.
      ignore_fields: see `Checkpoint.open`.

    Raises:
      CheckpointError: the source cannot be served, the target is there or cannot be, the disk is
        too small, or what was written does not read back.
    """
    checkpoint = Checkpoint.open(source, ignore_fields=ignore_fields)
    source, target = checkpoint.folder, target.expanduser().absolute()
    if is_converted(source):
        raise CheckpointError(f"{source}: is converted already, must be in Hugging Face form")
    check_target(source, target, force)
    with WeightFiles(source) as tensors:
        check_tensors(tensors, checkpoint.config)
        names, buffers = _order(checkpoint, tensors)
        cast = _describe_cast(tensors, names, dtype)
        if cast:
            reporter.note(f"casting weights from {cast}")
        with new_folder(target, reporter) as (folder, put_in_place):
            needed = _bytes_needed(tensors, names, dtype)  # after what was left there is gone
            require_space(target.parent, needed, f"converting {source.name}")
            with reporter.phase("converting") as update:
                entries = _write_weights(folder, tensors, names, dtype, update)
            converted = {tensors.file(name).name for name in tensors} | {INDEX}
            left_out = _copy_files(source, folder, converted)
            if cast and dtype is not None:
                _set_dtype(folder / "config.json", dtype)
            made_by = f"quire {__version__}, orbax-checkpoint {version('orbax-checkpoint')}"
            files = _list_files(folder)
            manifest = Manifest(origin or str(source), made_by, cast, entries, files)
            write_manifest(folder, manifest)
            with reporter.phase("checking") as update:
                _check_written(folder, update)
            put_in_place()
    if buffers:
        said = f"{len(buffers)} tensors such as {buffers[0]}"
        reporter.note(f"left out, follow from config.json: {said}")
    if left_out:
        reporter.note(f"left out, not part of the model: {', '.join(left_out)}")
    return manifest


# Weights.


def _describe_cast(tensors: WeightFiles, names: list[str], dtype: str | None) -> str | None:
    before = sorted({tensors.dtype(name) for name in names})
    return None if dtype is None or before == [dtype] else f"{', '.join(before)} to {dtype}"


def _target_dtype(tensors: WeightFiles, name: str, dtype: str | None) -> np.dtype:
    return numpy_dtype(dtype or tensors.dtype(name))


def _bytes_needed(tensors: WeightFiles, names: list[str], dtype: str | None) -> int:
    return sum(
        int(np.prod(tensors.shape(name))) * _target_dtype(tensors, name, dtype).itemsize
        for name in names
    )


def _order(checkpoint: Checkpoint, tensors: WeightFiles) -> tuple[list[str], list[str]]:
    """The tensors to write, the model's in the order of its layers and then what else there is; and
    the buffers that stay behind."""
    known = [piece.name for p in parameters(checkpoint.config) for piece in p.pieces]
    others = sorted(set(tensors) - set(known))
    buffers = [name for name in others if is_harmless(name)]
    return known + [name for name in others if name not in buffers], buffers


def _write_weights(
    folder: Path, tensors: WeightFiles, names: list[str], dtype: str | None, update: Update
) -> dict[str, TensorEntry]:
    digests = {name: new_digest() for name in names}
    total, done = _bytes_needed(tensors, names, dtype), 0

    def blocks(name: str, target: np.dtype, rows: int) -> Iterator[tuple[slice, np.ndarray]]:
        nonlocal done
        for where, values in tensors.chunks(name, rows):
            with np.errstate(over="ignore"):
                block = values.astype(target, copy=False)
            refuse_overflow(tensors, name, values, block)
            digests[name].update(_bytes_of(block))
            done += block.nbytes
            del values
            yield where, block
            del block  # before the next one is read
            update(done, total)

    leaves = {}
    for name in names:
        target = _target_dtype(tensors, name, dtype)
        leaves[name] = Leaf(tensors.shape(name), target, partial(blocks, name, target))
    write_tensors(folder, leaves)
    return {
        name: TensorEntry(leaf.shape, leaf.dtype.name, digests[name].hexdigest())
        for name, leaf in leaves.items()
    }


def _bytes_of(block: np.ndarray) -> memoryview:
    """The values as bytes, without a copy. (Every machine that runs JAX is little-endian.)"""
    return np.ascontiguousarray(block).view(np.uint8).data


def _check_written(folder: Path, update: Update) -> None:
    """Reads every tensor back the way that loading does, and holds it against its checksum."""
    with OrbaxTensors(folder) as tensors:
        total, done = sum(tensors.nbytes(name) for name in tensors), 0
        for name, entry in tensors.manifest.tensors.items():
            digest = new_digest()
            for _, block in tensors.chunks(name):
                digest.update(_bytes_of(block))
                done += block.nbytes
                update(done, total)
            if digest.hexdigest() != entry.blake2b:
                raise CheckpointError(
                    f"{tensors.file(name)}: tensor {name}: does not read back as it was written; "
                    "is the disk sound?"
                )


# Other files.


def _copy_files(source: Path, target: Path, converted: set[str]) -> list[str]:
    """Copies what belongs to the model beside its weights; returns what it left."""
    left_out = []
    for path in sorted(source.iterdir()):
        if path.name in converted or path.name.startswith("."):
            continue
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)
        else:
            left_out.append(path.name + "/" * path.is_dir())
    return left_out


def _set_dtype(file: Path, dtype: str) -> None:
    """config.json says the dtype of the weights beside it."""
    fields = read_json(file)
    fields.pop("torch_dtype", None)  # the older name of the same
    file.write_text(json.dumps({**fields, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _list_files(folder: Path) -> dict[str, FileEntry]:
    return {
        path.relative_to(folder).as_posix(): FileEntry(path.stat().st_size, digest_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
