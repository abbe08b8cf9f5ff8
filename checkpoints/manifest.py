"""quire_checkpoint.json: what a converted folder holds, and the checksums of all of it.

Written last by convert.py, so a folder that has it is whole. Opening a folder checks the format
version, the manifest's own checksum and that every file is there in its size; `damaged_files` reads
every byte.

    folder/
      quire_checkpoint.json   this file
      config.json, tokenizer.json, ...   as they were
      weights/                an Orbax PyTree checkpoint: {tensor name: array}
        model.norm.weight/    a zarr array, unfused, under Hugging Face's name
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError
from .json_fields import read_json

MANIFEST = "quire_checkpoint.json"
WEIGHTS = "weights"
FORMAT_VERSION = 1

_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor.

    Attributes:
      shape, dtype: of the array; dtype is one of `DTYPES`.
      blake2b: of its values, row by row, little-endian: it holds however they are stored.
    """

    shape: tuple[int, ...]
    dtype: str
    blake2b: str


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file: its size in bytes and the checksum of its bytes."""

    size: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted folder holds.

    Attributes:
      source: what it was made from, as the user named it.
      made_by: versions of what wrote it.
      cast: "float32 to bfloat16" where --dtype changed the weights; else None.
      tensors: by name.
      files: every other file of the folder, by path relative to it.
    """

    source: str
    made_by: str
    cast: str | None
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]


def is_converted(folder: Path) -> bool:
    """Whether the folder is of Quire's own kind.

    Raises:
      CheckpointError: it is what a cut-off conversion left.
    """
    if (folder / MANIFEST).is_file():
        return True
    if (folder / WEIGHTS / "_METADATA").is_file() or partial_of(folder.name) is not None:
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}: an unfinished conversion; run `quire convert` again"
        )
    return False


def partial_name(name: str) -> str:
    """What the folder `name` is called while it is written."""
    return f".{name}.partial"


def partial_of(name: str) -> str | None:
    """The folder that one of this name was to become; None for any other name."""
    is_partial = name.startswith(".") and name.endswith(".partial") and len(name) > 9
    return name[1:-8] if is_partial else None


def new_digest() -> Any:
    """The checksum in use: 128 bits of blake2b."""
    return hashlib.blake2b(digest_size=16)


def digest_of(file: Path) -> str:
    digest = new_digest()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    fields = {"format": "quire", "format_version": FORMAT_VERSION, **asdict(manifest)}
    text = json.dumps({**fields, "checksum": _checksum(fields)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, with what it promises checked but for the files' contents."""
    file = folder / MANIFEST
    fields = read_json(file)
    version = fields.get("format_version")
    if fields.get("format") != "quire" or not isinstance(version, int):
        raise CheckpointError(f"{file}: format: must be a checkpoint written by `quire convert`")
    if version != FORMAT_VERSION:
        mend = "update Quire" if version > FORMAT_VERSION else "convert the original again"
        raise CheckpointError(
            f"{file}: format_version: got {version}, must be {FORMAT_VERSION} for this "
            f"Quire; {mend}"
        )
    if fields.pop("checksum", None) != _checksum(fields):
        raise CheckpointError(f"{file}: checksum: differs, so the file is damaged; convert again")
    manifest = Manifest(
        source=fields["source"],
        made_by=fields["made_by"],
        cast=fields["cast"],
        tensors={
            name: TensorEntry(tuple(entry["shape"]), entry["dtype"], entry["blake2b"])
            for name, entry in fields["tensors"].items()
        },
        files={name: FileEntry(**entry) for name, entry in fields["files"].items()},
    )
    for problem in _wrong_sizes(folder, manifest):
        raise CheckpointError(f"{problem}; copy or convert it again")
    return manifest


def damaged_files(
    folder: Path, progress: Callable[[int, int], None] | None = None
) -> Iterator[str]:
    """Reads every byte of a converted folder; says what differs from what was written, by file.

    A file of weights lies in a folder with the tensor's name. The manifest itself is checked by
    `read_manifest`, which this calls.
    """
    manifest = read_manifest(folder)
    total, done = sum(entry.size for entry in manifest.files.values()), 0
    for name, entry in manifest.files.items():
        try:
            same = digest_of(folder / name) == entry.blake2b
        except OSError as error:
            yield f"{folder / name}: cannot be read: {error}"
        else:
            if not same:
                yield f"{folder / name}: checksum differs{_of_tensor(name)}"
        done += entry.size
        if progress is not None:
            progress(done, total)


def _of_tensor(name: str) -> str:
    parts = PurePosixPath(name).parts
    return f" (tensor {parts[1]})" if len(parts) == 3 and parts[0] == WEIGHTS else ""


def _wrong_sizes(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files.items():
        file = folder / name
        if not file.is_file():
            yield f"{file}: does not exist, but {MANIFEST} lists it"
        elif file.stat().st_size != entry.size:
            yield f"{file}: got {file.stat().st_size} bytes, must be {entry.size}"


def _checksum(fields: Mapping[str, Any]) -> str:
    digest = new_digest()
    digest.update(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    return str(digest.hexdigest())
