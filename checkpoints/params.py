"""Weights on disk -> Quire's parameters, and back. Called by folder.py and by the trainer.

Loading hands on one parameter at a time: the host holds the parameter being assembled and one chunk
of a tensor (`CHUNK_BYTES`), beside the mapped pages that the kernel may drop whenever it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ..errors import CheckpointError
from ..model.config import DTYPES, ModelConfig
from .names import EMBEDDING, HEAD, Parameter, Piece, is_harmless, parameters, pieces_of
from .safetensors_files import SINGLE
from .tensors import Tensors, open_tensors

Put = Callable[[str, np.ndarray], None]
Progress = Callable[[int, int], None]

_NUMPY: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy dtype of one of `DTYPES`."""
    if dtype not in _NUMPY:
        raise CheckpointError(f"dtype: got {dtype!r}, must be one of {', '.join(DTYPES)}")
    return _NUMPY[dtype]


def load_params(
    folder: Path, config: ModelConfig, dtype: str, put: Put, progress: Progress | None = None
) -> None:
    """Streams every parameter of the model to `put`, cast to `dtype`, in the order of its layers.

    Each array is fresh, C-contiguous and not touched again, so `put` may keep it or let it go. All
    names, shapes and dtypes are checked before the first `put`.

    Args:
      folder: a checkpoint folder.
      config: what the folder's config.json says.
      dtype: one of bfloat16, float16, float32.
      put: gets (name, array).
      progress: gets (bytes read, bytes in all), after each parameter.
    """
    target = numpy_dtype(dtype)
    with open_tensors(folder) as files:
        wanted = parameters(config)
        check_tensors(files, config)
        total = sum(files.nbytes(piece.name) for p in wanted for piece in p.pieces)
        done = 0
        for parameter in wanted:
            put(parameter.name, _assemble(files, parameter, target))
            done += sum(files.nbytes(piece.name) for piece in parameter.pieces)
            if progress is not None:
                progress(done, total)


def save_params(folder: Path, config: ModelConfig, params: Mapping[str, np.ndarray]) -> Path:
    """Writes `folder`/model.safetensors under Hugging Face's names, fused parameters cut up.

    The dtypes are those of `params`, which must hold exactly the parameters of `config`.
    """
    tensors = dict(to_hugging_face(config, params))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder / SINGLE


def to_hugging_face(
    config: ModelConfig, params: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that `params` are made of under Hugging Face's names, as views where possible."""
    wanted = parameters(config)
    _check_names(params, wanted)
    for parameter in wanted:
        array = np.asarray(params[parameter.name])
        if array.shape != parameter.shape or array.dtype.name not in DTYPES:
            raise CheckpointError(
                f"parameter {parameter.name}: got shape {array.shape} and dtype {array.dtype}, "
                f"must be {parameter.shape} and one of {', '.join(DTYPES)}"
            )
        for piece, rows in pieces_of(parameter):
            yield piece.name, np.ascontiguousarray(array[rows])


def _assemble(files: Tensors, parameter: Parameter, dtype: np.dtype) -> np.ndarray:
    out = np.empty(parameter.shape, dtype)
    for piece, rows in pieces_of(parameter):
        _read(files, piece.name, out[rows])
    return out


def _read(files: Tensors, name: str, out: np.ndarray) -> None:
    """Reads and casts a tensor into `out`."""
    for rows, chunk in files.chunks(name):
        with np.errstate(over="ignore"):
            out[rows] = chunk
        refuse_overflow(files, name, chunk, out[rows])


def refuse_overflow(files: Tensors, name: str, values: np.ndarray, cast: np.ndarray) -> None:
    """Raises CheckpointError where rows of a tensor became infinite in float16."""
    if cast.dtype == np.float16 != values.dtype and np.isinf(cast).any():
        worst = np.abs(values.astype(np.float32)).max()
        raise CheckpointError(
            f"{files.file(name)}: tensor {name}: holds {worst:g}, which float16 cannot "
            "(65504 at most); use bfloat16 or float32"
        )


def check_tensors(files: Tensors, config: ModelConfig) -> None:
    """Holds names, shapes and dtypes against the model; reads no values but those of a tied head.

    Raises:
      CheckpointError: a tensor is missing, wrong, or none of the model's.
    """
    pieces = [piece for parameter in parameters(config) for piece in parameter.pieces]
    for piece in pieces:
        _check_piece(files, piece, config)
    names = {piece.name for piece in pieces}
    for name in files:
        if name in names or is_harmless(name):
            continue
        if name == HEAD and config.tied_embeddings:
            _check_tied_head(files, config)
            continue
        raise CheckpointError(
            f"{files.file(name)}: tensor {name}: not part of a {config.family} model as "
            "config.json describes it"
        )


def _check_piece(files: Tensors, piece: Piece, config: ModelConfig) -> None:
    if piece.name not in files:
        hint = "; is tie_word_embeddings missing from config.json?" if piece.name == HEAD else ""
        raise CheckpointError(
            f"{files.folder}: tensor {piece.name}: missing, must be there with shape {piece.shape} "
            f"for a {config.family} model as config.json describes it{hint}"
        )
    if files.shape(piece.name) != piece.shape:
        raise CheckpointError(
            f"{files.file(piece.name)}: tensor {piece.name}: got shape {files.shape(piece.name)}, "
            f"must be {piece.shape} by config.json"
        )
    files.dtype(piece.name)


def _check_tied_head(files: Tensors, config: ModelConfig) -> None:
    """A tied checkpoint may store its head all the same, if it is the embedding table.

    Where they differ one of them was trained and is about to be dropped; which, nobody can tell.
    """
    same = files.shape(HEAD) == files.shape(EMBEDDING) and files.dtype(HEAD) == files.dtype(
        EMBEDDING
    )
    if same:
        pairs = zip(files.chunks(HEAD), files.chunks(EMBEDDING), strict=True)
        same = all(head.tobytes() == table.tobytes() for (_, head), (_, table) in pairs)
    if not same:
        raise CheckpointError(
            f"{files.file(HEAD)}: tensor {HEAD}: differs from {EMBEDDING}, must be equal or absent "
            "where config.json sets tie_word_embeddings; set that to false to use both"
        )


def _check_names(params: Mapping[str, np.ndarray], wanted: list[Parameter]) -> None:
    names = {parameter.name for parameter in wanted}
    missing, unexpected = sorted(names - params.keys()), sorted(params.keys() - names)
    if missing or unexpected:
        raise CheckpointError(
            f"params: missing {missing[:3]}, unexpected {unexpected[:3]}; must be exactly the "
            "parameters of the config"
        )
