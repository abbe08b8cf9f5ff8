"""A checkpoint folder of either kind, opened. The one thing that serving/ uses from here.

It is in Hugging Face form, or was made from that by `quire convert` (manifest.py).

Opening reads the small JSON files; the tokenizer and the chat template are read when first asked
for (who sends token ids needs neither), the weights when `load_params` is called.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError
from ..model.config import Dtype, ModelConfig
from .chat_template import ChatTemplate, load_chat_template
from .generation_config import GenerationConfig, read_generation_config
from .hf_config import read_config
from .manifest import is_converted, read_manifest
from .params import Progress, Put, load_params
from .tensors import open_tensors
from .tokenizer import Tokenizer, load_tokenizer, read_special_tokens


@dataclass(frozen=True)
class Checkpoint:
    """What a folder says about its model.

    Attributes:
      folder: where it is.
      config: the model's sizes.
      generation: default sampling values; its `eos_ids` may be empty, see `eos_ids` here.
      weights: False where it was opened without: then they are not to be read.
    """

    folder: Path
    config: ModelConfig
    generation: GenerationConfig
    weights: bool = True

    @classmethod
    def open(
        cls, path: str | Path, *, ignore_fields: Collection[str] = (), weights: bool = True
    ) -> Checkpoint:
        """Reads config.json and generation_config.json of the folder `path`.

        Args:
          path: a folder.
          ignore_fields: fields of config.json to let pass although Quire does not know them.
          weights: whether it must have weights. Without, a config.json that names no dtype means
            float32, as in transformers.
        """
        folder = Path(path).expanduser()
        if not folder.exists():
            raise CheckpointError(f"{folder}: does not exist, must be a model folder")
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is a file, must be a model folder")
        if is_converted(folder):
            read_manifest(folder)
        config = read_config(
            folder,
            ignore_fields=ignore_fields,
            weights_dtype=(lambda: _weights_dtype(folder)) if weights else None,
        )
        return cls(folder, config, read_generation_config(folder), weights)

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer.json").is_file()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises `CheckpointError` where there is none that Quire can read."""
        return load_tokenizer(self.folder)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """False in a condition where the checkpoint has none; rendering then says so."""
        return load_chat_template(self.folder, read_special_tokens(self.folder))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends an answer, by generation_config.json, else config.json, else the tokenizer."""
        if self.generation.eos_ids or not self.has_tokenizer:
            return self.generation.eos_ids
        eos = self.tokenizer.eos_id
        return () if eos is None else (eos,)

    def load_params(self, dtype: str, put: Put, progress: Progress | None = None) -> None:
        """Streams the weights to `put`, cast to `dtype`; see `params.load_params`."""
        load_params(self.folder, self.config, dtype, put, progress)


def _weights_dtype(folder: Path) -> Dtype:
    """The dtype of the first tensor on disk, for a config.json that names none."""
    with open_tensors(folder) as files:
        for name in files:
            return files.dtype(name)
    return "float32"
