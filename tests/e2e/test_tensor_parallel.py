"""A model cut over 1, 2, 4 and 8 devices gives the same tokens, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.checkpoints.params import save_params
from quire.config import EngineConfig
from quire.errors import InvalidConfig
from quire.model.abstract import AbstractDecoder
from quire.model.config import ModelConfig, RopeConfig
from quire.model.mesh import default_mesh
from quire.model.parallel import arrange, local_config
from quire.model.sizing import weight_bytes

CHILD = Path(__file__).with_name("tensor_parallel_child.py")

SMALL: dict[str, Any] = {
    "vocab_size": 301,  # no number of devices divides it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
CASES = {
    # Fewer KV heads than devices, every bias, an output projection of its own.
    "llama": (
        {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        (1, 2, 4, 8),
    ),
    "qwen3": (
        {"model_type": "qwen3", "num_key_value_heads": 4, "tie_word_embeddings": True},
        {"qk_norm": True, "tied_embeddings": True},
        (1, 4),
    ),
}


def model(name: str) -> ModelConfig:
    fields, features, _ = CASES[name]
    return ModelConfig(
        family=name, vocab_size=301, hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=8, num_kv_heads=fields["num_key_value_heads"], head_dim=8, norm_eps=1e-5,
        rope=RopeConfig(), windows=(None, None), max_positions=512, dtype="float32", **features,
    )  # fmt: skip


def write(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SMALL, **CASES[name][0]}))
    config, draw = model(name), np.random.default_rng(0)
    specs = AbstractDecoder(config, "float32").specs
    params = {
        # Large enough that answers vary; biases and scales are random, so that each counts.
        k: (draw.standard_normal(s.shape) * (0.4 if len(s.shape) == 2 else 0.2)).astype(np.float32)
        + (k.endswith("scale"))
        for k, s in specs.items()
    }
    save_params(folder, config, {k: v.astype(np.float32) for k, v in params.items()})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_devices_does_not_change_a_token(name, tmp_path):
    counts = [str(n) for n in CASES[name][2]]
    # JAX takes the number of CPU devices once, before its first use: hence another interpreter.
    done = subprocess.run(
        [sys.executable, "-P", str(CHILD),
         str(write(tmp_path / name, name)), *counts],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads(done.stdout.splitlines()[-1])
    first = runs["1"]["tokens"]
    assert len({t for answer in first for t in answer}) > 20
    for count in counts:
        run, shards = runs[count], int(count)
        assert run["tokens"] == first, count
        assert run["devices"] == shards
        local = local_config(model(name), shards)
        assert run["kv_heads_per_device"] == local.num_kv_heads
        assert run["weight_bytes_per_device"] == weight_bytes(local, "float32")


def test_rows_of_fused_parameters_go_where_their_heads_are():
    config = model("llama")  # 8 query heads, 2 KV heads, of 8
    whole = np.arange(config.q_size + 2 * config.kv_size)
    by_device = arrange(whole, ("qkv",), config, 4).reshape(4, -1)
    assert by_device.shape == (4, 16 + 8 + 8)
    for device, rows in enumerate(by_device):
        kv_head = device // 2
        np.testing.assert_array_equal(rows[:16], 16 * device + np.arange(16))
        np.testing.assert_array_equal(rows[16:24], 64 + 8 * kv_head + np.arange(8))
        np.testing.assert_array_equal(rows[24:], 80 + 8 * kv_head + np.arange(8))
    gate_up = arrange(np.arange(96), ("gate_up",), config, 2).reshape(2, 2, 24)
    np.testing.assert_array_equal(gate_up[1], [24 + np.arange(24), 72 + np.arange(24)])
    table = arrange(np.ones((301, 2)), ("vocab", "embed"), config, 8)
    assert table.shape == (304, 2) and not table[301:].any()


@pytest.mark.parametrize(
    ("shards", "message"),
    [(3, "must divide the model's 8 attention heads"), (16, "must divide the model's 8 attention")],
)
def test_what_cannot_be_cut_is_refused(shards, message):
    with pytest.raises(InvalidConfig, match=f"tensor_parallel: got {shards}, {message}"):
        local_config(model("llama"), shards)


def test_more_devices_than_there_are_is_refused():
    config = EngineConfig(tensor_parallel=64)
    with pytest.raises(InvalidConfig, match="tensor_parallel: got 64, must be at most"):
        default_mesh(config.tensor_parallel)
