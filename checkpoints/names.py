"""Which Hugging Face tensors make which Quire parameter: one table of names and shapes.

Used in both directions: params.py assembles a Quire parameter from its pieces when it loads, and
cuts it up again when it saves. Weights keep the [out, in] layout they have on disk, so there are no
transposes; pieces of a fused parameter lie one after the other along axis 0.

Symbols in the table:  V vocabulary  E hidden  I intermediate  D head dim  Q = heads x D
KV = key/value heads x D.  `{i}` is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..model.config import ModelConfig


@dataclass(frozen=True)
class Piece:
    """A tensor on disk."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of Quire's model, and the tensors it is made of, first rows first."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class _Row:
    """A line of the table.

    Attributes:
      name: Quire's parameter.
      pieces: (tensor on disk, its rows) in order.
      columns: symbol of axis 1; empty for a vector.
      when: the `ModelConfig` attribute that must be true; a leading "not " turns it round.
    """

    name: str
    pieces: tuple[tuple[str, str], ...]
    columns: str = ""
    when: str = ""


_ATTN = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."


def _qkv(kind: str) -> tuple[tuple[str, str], ...]:
    return (
        (f"{_ATTN}q_proj.{kind}", "Q"),
        (f"{_ATTN}k_proj.{kind}", "KV"),
        (f"{_ATTN}v_proj.{kind}", "KV"),
    )


def _gate_up(kind: str) -> tuple[tuple[str, str], ...]:
    return ((f"{_MLP}gate_proj.{kind}", "I"), (f"{_MLP}up_proj.{kind}", "I"))


_LLAMA = (
    _Row("embed.weight", (("model.embed_tokens.weight", "V"),), "E"),
    _Row("layers.{i}.attn_norm.scale", (("model.layers.{i}.input_layernorm.weight", "E"),)),
    _Row("layers.{i}.attn.qkv.weight", _qkv("weight"), "E"),
    _Row("layers.{i}.attn.qkv.bias", _qkv("bias"), when="qkv_bias"),
    _Row("layers.{i}.attn.q_norm.scale", ((f"{_ATTN}q_norm.weight", "D"),), when="qk_norm"),
    _Row("layers.{i}.attn.k_norm.scale", ((f"{_ATTN}k_norm.weight", "D"),), when="qk_norm"),
    _Row("layers.{i}.attn.out.weight", ((f"{_ATTN}o_proj.weight", "E"),), "Q"),
    _Row("layers.{i}.attn.out.bias", ((f"{_ATTN}o_proj.bias", "E"),), when="out_bias"),
    _Row("layers.{i}.mlp_norm.scale", (("model.layers.{i}.post_attention_layernorm.weight", "E"),)),
    _Row("layers.{i}.mlp.gate_up.weight", _gate_up("weight"), "E"),
    _Row("layers.{i}.mlp.gate_up.bias", _gate_up("bias"), when="mlp_bias"),
    _Row("layers.{i}.mlp.down.weight", ((f"{_MLP}down_proj.weight", "E"),), "I"),
    _Row("layers.{i}.mlp.down.bias", ((f"{_MLP}down_proj.bias", "E"),), when="mlp_bias"),
    _Row("final_norm.scale", (("model.norm.weight", "E"),)),
    _Row("lm_head.weight", (("lm_head.weight", "V"),), "E", when="not tied_embeddings"),
)

# The four families have kept Llama's names; what differs between them is which rows apply.
_TABLES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Buffers that old versions of transformers saved; they follow from config.json.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def is_harmless(tensor: str) -> bool:
    """Whether a tensor on disk may be left unread: it holds nothing that was trained."""
    return _HARMLESS.fullmatch(tensor) is not None


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the order of its layers."""
    rows = [row for row in _TABLES[config.family] if _applies(row, config)]
    layered = [row for row in rows if "{i}" in row.name]
    first = rows.index(layered[0])
    last = first + len(layered)
    out = [_parameter(row, config, 0) for row in rows[:first]]
    out += [_parameter(row, config, i) for i in range(config.num_layers) for row in layered]
    return out + [_parameter(row, config, 0) for row in rows[last:]]


def pieces_of(parameter: Parameter) -> Iterator[tuple[Piece, slice]]:
    """Each tensor on disk with the rows of the parameter that it holds."""
    start = 0
    for piece in parameter.pieces:
        yield piece, slice(start, start + piece.shape[0])
        start += piece.shape[0]


def _applies(row: _Row, config: ModelConfig) -> bool:
    wanted = not row.when.startswith("not ")
    return not row.when or bool(getattr(config, row.when.removeprefix("not "))) is wanted


def _parameter(row: _Row, config: ModelConfig, layer: int) -> Parameter:
    sizes = {
        "V": config.vocab_size,
        "E": config.hidden_size,
        "I": config.intermediate_size,
        "D": config.head_dim,
        "Q": config.q_size,
        "KV": config.kv_size,
    }
    columns = (sizes[row.columns],) if row.columns else ()
    pieces = tuple(
        Piece(name.format(i=layer), (sizes[rows], *columns)) for name, rows in row.pieces
    )
    total = sum(piece.shape[0] for piece in pieces)
    return Parameter(row.name.format(i=layer), (total, *columns), pieces)
