"""Keeps a training on disk, in files small enough to be carried around, and goes on from there.

    FOLDER/run.json                 the record, and what must not change
    FOLDER/tokenizer.json           learned once, for the whole training
    FOLDER/part-0.safetensors …     parameters and optimizer, `PART_BYTES` at most each

A save replaces the folder as a whole, so whoever is stopped in the middle of one finds the last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from ...errors import CheckpointError
from .train import Record, State

PART_BYTES = 15 << 20
RUN, TOKENIZER = "run.json", "tokenizer.json"


def save(
    folder: Path,
    state: State,
    record: Record,
    settings: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    """Writes a training.

    Args:
      settings: what a run that goes on from here must be started with.
    """
    new, old = folder.with_name(f"{folder.name}.new"), _old(folder)
    mend(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for index, part in enumerate(_parts(_named(jax.device_get(state)))):
        save_file(part, new / f"part-{index}.safetensors")
    tokenizer.save(str(new / TOKENIZER), pretty=False)
    run = {"settings": settings, "record": asdict(record)}
    (new / RUN).write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def mend(folder: Path) -> None:
    """Puts back the last save where a later one was stopped between taking it away and the end."""
    if not folder.exists() and _old(folder).exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def record_of(folder: Path) -> Record:
    """How far the training came that was saved there."""
    return Record(**json.loads((folder / RUN).read_text("utf-8"))["record"])


def restore(folder: Path, like: State, settings: Mapping[str, Any]) -> tuple[State, Record]:
    """A training as it was saved.

    Args:
      like: a state of the same shapes; its values do not matter.

    Raises:
      CheckpointError: nothing was saved there, or by a run with other settings.
    """
    if not (folder / RUN).exists():
        raise CheckpointError(f"{folder}: holds no saved training")
    run = json.loads((folder / RUN).read_text("utf-8"))
    # As JSON has them: tuples become lists on the way.
    for name, wanted in json.loads(json.dumps(settings)).items():
        if run["settings"].get(name) != wanted:
            held, got = (str(value)[:60] for value in (run["settings"].get(name), wanted))
            raise CheckpointError(
                f"{folder}: was trained with {name} {held}, got {got}; say the same, or start anew "
                "in another folder"
            )
    found: dict[str, np.ndarray] = {}
    for part in sorted(folder.glob("part-*.safetensors")):
        found |= load_file(part)
    return _filled(like, found, folder), Record(**run["record"])


def _named(state: State) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _filled(like: State, found: Mapping[str, np.ndarray], folder: Path) -> State:
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    values = []
    for path, leaf in leaves:
        array = found.get(name := jax.tree_util.keystr(path))
        if array is None or array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise CheckpointError(
                f"{folder}: {name}: must be there with shape {leaf.shape} and dtype {leaf.dtype}"
            )
        values.append(jnp.asarray(array))
    return jax.tree_util.tree_unflatten(tree, values)


def _parts(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays in parts of at most PART_BYTES; one larger than that has its own."""
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].nbytes):
        if size + array.nbytes > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = array.copy(order="C")  # safetensors writes memory as it lies
        size += array.nbytes
    return parts
