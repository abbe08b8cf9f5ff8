"""Weights made on the device: all there, of sane size, the same for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint

from quire import LLM, SamplingParams
from quire.checkpoints.folder import Checkpoint
from quire.errors import CheckpointError
from quire.model.abstract import AbstractDecoder
from quire.model.dummy_weights import dummy_params
from quire.model.mesh import Mesh, default_mesh

SIZES = {"max_num_seqs": 2, "max_batched_tokens": 32, "page_size": 16, "warmup": False}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with a config.json, and nothing else; that names no dtype."""
    config = {**tiny_checkpoint.CONFIG, "attention_bias": True}
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_every_parameter_as_specified(bare: Path) -> None:
    decoder = AbstractDecoder(Checkpoint.open(bare, weights=False).config, "bfloat16")
    seen: list[tuple[int, int]] = []
    params = dummy_params(decoder, default_mesh(), seed=3, progress=lambda *at: seen.append(at))
    assert list(params) == list(decoder.specs)
    for name, spec in decoder.specs.items():
        value = params[name]
        assert (value.shape, str(value.dtype)) == (spec.shape, spec.dtype)
        wide = np.asarray(value, np.float32)
        if name.endswith(".scale"):
            assert np.all(wide == 1)
        elif value.size > 500:
            assert 0.018 < wide.std() < 0.022 and abs(wide.mean()) < 0.003
        else:
            assert 0 < np.abs(wide).max() < 0.2
    assert seen[-1] == (len(params), len(params))
    first, second = (params[f"layers.{i}.mlp.down.weight"] for i in (0, 1))
    assert not jnp.array_equal(first, second)
    again, other = (dummy_params(decoder, default_mesh(), seed=seed) for seed in (3, 4))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, again))
    assert not jnp.array_equal(other["embed.weight"], params["embed.weight"])


def test_they_are_placed_on_the_mesh(bare: Path) -> None:
    decoder = AbstractDecoder(Checkpoint.open(bare, weights=False).config, "float32")
    mesh = Mesh(jax.devices()[:1])
    for name, value in dummy_params(decoder, mesh).items():
        assert value.sharding == mesh.of(decoder.specs[name].axes)


def test_an_engine_runs_on_a_config_alone_only_when_asked(bare: Path) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=0)
    with LLM(bare, dummy_weights=True, **SIZES) as llm:
        (result,) = llm.generate([[1, 2, 3]], sampling)
    (answer,) = result.outputs
    assert answer.finish_reason == "length" and len(answer.token_ids) == 3
    assert answer.logprobs is not None
    values = [p.logprob for at in answer.logprobs for p in at.values()]
    assert np.all(np.isfinite(values))
    with pytest.raises(CheckpointError, match="safetensors"):
        LLM(bare, **SIZES)
