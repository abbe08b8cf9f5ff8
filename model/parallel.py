"""Tensor parallelism: how one model is cut over the devices of a mesh. Pure host arithmetic.

Every device runs the same step program on its share of the heads, of the MLP and of the vocabulary
(Megatron-LM, arXiv:1909.08053): the decoder is built from `local_config`, sums what the shares give
after the attention and MLP outputs (model/decoder.py), and never learns how many there are
otherwise. Checkpoints know nothing of shards: `arrange` lays a parameter out while it is loaded.

Where there are fewer KV heads than devices, neighbouring devices hold copies of one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidConfig
from .config import ModelConfig
from .weights import Axes


def check_shards(config: ModelConfig, shards: int) -> None:
    """Raises InvalidConfig if the model cannot be cut into `shards`."""
    kv = config.num_kv_heads
    for name, size in (
        ("attention heads", config.num_heads),
        ("rows of the MLP", config.intermediate_size),
    ):
        if size % shards:
            raise InvalidConfig(
                f"tensor_parallel: got {shards}, must divide the model's {size} {name}"
            )
    if kv % shards and shards % kv:
        raise InvalidConfig(
            f"tensor_parallel: got {shards}, must divide the model's {kv} KV heads or be a "
            "multiple of them"
        )


def local_config(config: ModelConfig, shards: int) -> ModelConfig:
    """The numbers of one device's share; the vocabulary is rounded up."""
    if shards == 1:
        return config
    check_shards(config, shards)
    return replace(
        config,
        num_heads=config.num_heads // shards,
        num_kv_heads=max(1, config.num_kv_heads // shards),
        intermediate_size=config.intermediate_size // shards,
        vocab_size=-(-config.vocab_size // shards),
    )


def arrange(array: np.ndarray, axes: Axes, config: ModelConfig, shards: int) -> np.ndarray:
    """A parameter as its placement wants it: each device's rows lie together.

    Args:
      array: the whole parameter, fused pieces one after the other along axis 0.
      axes: its logical axes; "qkv", "gate_up" and "vocab" say what axis 0 is made of.
      config: of the whole model.
      shards: devices that share it.

    Returns:
      The array itself where nothing moves; else a copy, whose axis 0 is cut into `shards` equal
      parts. KV heads are repeated where there are fewer than shards, the vocabulary is padded with
      zeros.
    """
    if shards == 1:
        return array
    match axes[0]:
        case "qkv":
            return array[_qkv_rows(config, shards)]
        case "gate_up":
            return array[_gate_up_rows(config, shards)]
        case "vocab":
            missing = -array.shape[0] % shards
            return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) if missing else array
        case _:
            return array


def _qkv_rows(config: ModelConfig, shards: int) -> NDArray[np.int64]:
    """Per device: its query heads, then its key heads, then its value heads."""
    q = np.arange(config.q_size).reshape(shards, -1)
    kv_heads = np.arange(config.kv_size).reshape(config.num_kv_heads, config.head_dim)
    copies = max(1, shards // config.num_kv_heads)
    k = config.q_size + np.repeat(kv_heads, copies, axis=0).reshape(shards, -1)
    return np.concatenate([q, k, k + config.kv_size], axis=1).reshape(-1)


def _gate_up_rows(config: ModelConfig, shards: int) -> NDArray[np.int64]:
    """Per device: its rows of gate, then its rows of up."""
    gate = np.arange(config.intermediate_size).reshape(shards, -1)
    return np.concatenate([gate, gate + config.intermediate_size], axis=1).reshape(-1)
