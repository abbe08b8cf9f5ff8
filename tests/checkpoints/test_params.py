"""Weights in and out: fused values against torch's state dict, casts, shards, memory, refusals."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from quire.checkpoints.hf_config import read_config
from quire.checkpoints.names import is_harmless, parameters
from quire.checkpoints.params import load_params, numpy_dtype, save_params
from quire.checkpoints.safetensors_files import CHUNK_BYTES, WeightFiles
from quire.errors import CheckpointError
from quire.model.config import ModelConfig, RopeConfig

CASES = ["llama", "llama-bias", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-bias"]
NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(folder: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    params: dict[str, np.ndarray] = {}
    load_params(folder, read_config(folder), dtype, params.__setitem__)
    return params


def fused(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, np.ndarray]:
    """The parameters by hand, as the design spells them, without the table under test."""
    s = {name: tensor.float().numpy() for name, tensor in state.items()}
    out = {
        "embed.weight": s["model.embed_tokens.weight"],
        "final_norm.scale": s["model.norm.weight"],
    }
    if not config.tied_embeddings:
        out["lm_head.weight"] = s["lm_head.weight"]
    for i in range(config.num_layers):
        hf, q = f"model.layers.{i}.", f"layers.{i}."
        attn, mlp = hf + "self_attn.", hf + "mlp."
        out[q + "attn_norm.scale"] = s[hf + "input_layernorm.weight"]
        out[q + "mlp_norm.scale"] = s[hf + "post_attention_layernorm.weight"]
        for kind in ("weight", "bias"):
            if attn + "q_proj." + kind in s:
                qkv = [s[f"{attn}{part}_proj.{kind}"] for part in "qkv"]
                out[q + "attn.qkv." + kind] = np.concatenate(qkv)
            if attn + "o_proj." + kind in s:
                out[q + "attn.out." + kind] = s[attn + "o_proj." + kind]
            if mlp + "up_proj." + kind in s:
                both = [s[f"{mlp}{part}_proj.{kind}"] for part in ("gate", "up")]
                out[q + "mlp.gate_up." + kind] = np.concatenate(both)
                out[q + "mlp.down." + kind] = s[mlp + "down_proj." + kind]
        if attn + "q_norm.weight" in s:
            out[q + "attn.q_norm.scale"] = s[attn + "q_norm.weight"]
            out[q + "attn.k_norm.scale"] = s[attn + "k_norm.weight"]
    return out


@pytest.mark.parametrize("case", CASES)
def test_values_match_torch(case: str, write_model: Any) -> None:
    folder, state = write_model(case)
    config = read_config(folder)
    params, wanted = load(folder), fused(state, config)
    assert params.keys() == wanted.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)
        assert array.flags.c_contiguous and array.flags.writeable
    made = [(name, array.shape) for name, array in params.items()]
    assert made == [(parameter.name, parameter.shape) for parameter in parameters(config)]


@pytest.mark.parametrize("stored", list(NAMES))
@pytest.mark.parametrize("target", list(NAMES))
def test_casts(stored: str, target: str, write_model: Any) -> None:
    folder, state = write_model("qwen3", NAMES[stored])
    config = read_config(folder)
    assert config.dtype == stored
    params = load(folder, target)
    for name, wanted in fused(state, config).items():
        assert params[name].dtype == numpy_dtype(target)
        # Exact: the values were rounded to bfloat16 first, and lie within float16's range.
        np.testing.assert_array_equal(params[name].astype(np.float32), wanted)


def test_cast_rounds_to_nearest_even_as_torch_does(tmp_path: Path, write_model: Any) -> None:
    folder, _ = write_model("llama")
    tensors = load_file(folder / "model.safetensors")
    values = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
    tensors["model.embed_tokens.weight"] = values
    save_file(tensors, folder / "model.safetensors")
    for target, dtype in NAMES.items():
        wanted = torch.from_numpy(values).to(dtype).float().numpy()
        np.testing.assert_array_equal(load(folder, target)["embed.weight"].astype("f4"), wanted)


def test_float16_refuses_what_it_cannot_hold(write_model: Any) -> None:
    folder, _ = write_model("llama", torch.bfloat16)
    spoil(folder, "model.norm.weight", lambda a: np.full_like(a, 1e5))
    assert load(folder, "bfloat16")["final_norm.scale"][0] == ml_dtypes.bfloat16(1e5)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: holds .* float16 cannot"):
        load(folder, "float16")


def test_shards_equal_single_file(write_model: Any, tmp_path: Path) -> None:
    folder, _ = write_model("llama-bias")
    single = load(folder)
    shutil.rmtree(folder)
    folder, _ = write_model("llama-bias", max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    sharded = load(folder)
    assert single.keys() == sharded.keys()
    for name, array in single.items():
        np.testing.assert_array_equal(array, sharded[name])


def test_shards_through_links_as_in_a_hub_cache(write_model: Any, tmp_path: Path) -> None:
    folder, _ = write_model("llama", max_shard_size="20KB")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in folder.glob("model-*.safetensors"):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert load(folder)


def test_progress_ends_at_the_total(write_model: Any) -> None:
    folder, state = write_model("qwen2", torch.bfloat16)
    seen: list[tuple[int, int]] = []
    load_params(folder, read_config(folder), "float32", lambda *_: None, lambda *a: seen.append(a))
    total = sum(tensor.numel() * 2 for tensor in state.values())
    assert seen[-1] == (total, total) and seen == sorted(seen)
    assert len(seen) == len(parameters(read_config(folder)))


# Memory.


class Peak:
    """The most that Python and numpy held since the last `reset`, and what they hold after."""

    def __enter__(self) -> Peak:
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.held, self.peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()


@pytest.mark.parametrize(("target", "bytes_each"), [("bfloat16", 2), ("float32", 4)])
def test_memory_is_bounded_by_the_largest_parameter(
    target: str, bytes_each: int, tmp_path: Path
) -> None:
    config = ModelConfig(
        family="llama", vocab_size=8192, hidden_size=1024, intermediate_size=6144, num_layers=3,
        num_heads=16, num_kv_heads=4, head_dim=64, norm_eps=1e-6, rope=RopeConfig(),
        windows=(None,) * 3, max_positions=64,
    )  # fmt: skip
    shapes = {parameter.name: parameter.shape for parameter in parameters(config)}
    save_params(tmp_path, config, {n: np.zeros(s, ml_dtypes.bfloat16) for n, s in shapes.items()})
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert on_disk > 100e6
    largest = max(np.prod(shape) for shape in shapes.values()) * bytes_each
    sizes: list[int] = []
    with Peak() as memory:
        load_params(tmp_path, config, target, lambda _, array: sizes.append(array.nbytes))
    assert sum(sizes) > 100e6 * bytes_each / 2
    assert largest <= memory.peak < largest + 3 * CHUNK_BYTES < 2 * largest < on_disk
    assert memory.held < CHUNK_BYTES


# Names.


@pytest.mark.parametrize("case", CASES)
def test_table_names_every_tensor_once(case: str, write_model: Any) -> None:
    folder, state = write_model(case)
    config = read_config(folder)
    pieces = [piece for parameter in parameters(config) for piece in parameter.pieces]
    names = [piece.name for piece in pieces]
    assert len(set(names)) == len(names)
    wanted = set(state) - ({"lm_head.weight"} if config.tied_embeddings else set())
    assert set(names) == wanted
    assert all(piece.shape == tuple(state[piece.name].shape) for piece in pieces)


@pytest.mark.parametrize("case", CASES)
def test_saved_folder_is_a_genuine_one(case: str, write_model: Any, tmp_path: Path) -> None:
    folder, state = write_model(case)
    params, copy = load(folder), tmp_path / "copy"
    save_params(copy, read_config(folder), params)
    for name, array in load_file(copy / "model.safetensors").items():
        np.testing.assert_array_equal(array, state[name].numpy())
    shutil.copy(folder / "config.json", copy)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_save_checks_its_input(write_model: Any, tmp_path: Path) -> None:
    folder, _ = write_model()
    params, config = load(folder), read_config(folder)
    short = {name: array for name, array in params.items() if name != "embed.weight"}
    with pytest.raises(CheckpointError, match=r"missing \['embed\.weight'\]"):
        save_params(tmp_path / "x", config, short)
    with pytest.raises(CheckpointError, match=r"unexpected \['extra'\]"):
        save_params(tmp_path / "x", config, {**params, "extra": params["embed.weight"]})
    with pytest.raises(CheckpointError, match=r"embed\.weight: got shape \(32, 96\)"):
        save_params(tmp_path / "x", config, {**params, "embed.weight": params["embed.weight"].T})
    with pytest.raises(CheckpointError, match=r"got shape .* and dtype float64, must be"):
        save_params(tmp_path / "x", config, {name: a.astype("f8") for name, a in params.items()})


# Refusals.


def spoil(folder: Path, name: str, change: Callable[[np.ndarray], Any] | None) -> None:
    """Changes (or with None: removes) one tensor of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = {key: array.copy() for key, array in load_file(file).items()}
    old = tensors.pop(name, np.zeros((2, 2), np.float32))
    if change is not None:
        tensors[name] = change(old)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", None, r"tensor model\.norm\.weight: missing, .*shape \(32,\)"),
        ("lm_head.weight", None, r"lm_head\.weight: missing.*is tie_word_embeddings missing"),
        (
            "model.layers.1.self_attn.k_proj.weight",
            lambda a: np.ascontiguousarray(a.T),
            r"safetensors: tensor .*k_proj\.weight: got shape \(32, 16\), must be \(16, 32\)",
        ),
        ("model.norm.weight", lambda a: a.reshape(1, 32), r"got shape \(1, 32\), must be \(32,\)"),
        ("model.norm.weight", lambda a: a.astype("f8"), "model.norm.weight: got dtype F64, must"),
        ("model.norm.weight", lambda a: a.astype("i4"), "got dtype I32"),
        ("model.layers.9.extra", lambda a: a, r"model\.layers\.9\.extra: not part of a llama"),
        (
            "model.layers.0.self_attn.q_proj.bias",
            lambda a: np.zeros(32, np.float32),
            r"q_proj\.bias: not part of a llama model",
        ),
    ],
)
def test_wrong_tensors(name: str, change: Any, message: str, write_model: Any) -> None:
    folder, _ = write_model()
    spoil(folder, name, change)
    seen: list[str] = []
    with pytest.raises(CheckpointError, match=message):
        load_params(folder, read_config(folder), "float32", lambda n, _: seen.append(n))
    assert not seen  # everything is checked before anything is handed on


def test_float8_is_refused_by_name(write_model: Any) -> None:
    folder, state = write_model()
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_torch(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="got dtype F8_E4M3, must be one of BF16, F16, F32"):
        load(folder)


def test_unknown_dtype_argument(write_model: Any) -> None:
    folder, _ = write_model()
    with pytest.raises(CheckpointError, match="dtype: got 'int8', must be one of bfloat16"):
        load(folder, "int8")


def test_harmless_buffers_are_left_unread(write_model: Any) -> None:
    folder, _ = write_model()
    plain = load(folder)
    spoil(folder, "model.layers.0.self_attn.rotary_emb.inv_freq", lambda _: np.ones(4, np.float64))
    assert load(folder).keys() == plain.keys()
    assert is_harmless("model.rotary_emb.inv_freq")
    assert not is_harmless("model.layers.0.self_attn.rotary_emb.inv_freq.weight")


def test_tied_head_on_disk(write_model: Any) -> None:
    folder, _ = write_model("qwen2-tied")
    table = load(folder)["embed.weight"]
    spoil(folder, "lm_head.weight", lambda _: table)
    assert "lm_head.weight" not in load(folder)
    other = table.copy()
    other[-1, -1] += 1
    for bad in (other, table[:-1], table.astype(np.float16)):
        spoil(folder, "lm_head.weight", lambda _, bad=bad: bad)  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=r"lm_head\.weight: differs from model\.embed"):
            load(folder)


@pytest.mark.parametrize("spare", [-100, 100, 4, 0])
def test_truncated_file(spare: int, write_model: Any) -> None:
    folder, _ = write_model()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: spare or None] if spare else b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or damaged: .*again"):
        load(folder)


@pytest.mark.parametrize("header", [b"not json at all!", b"<html>oops</html>" * 9])
def test_corrupt_header(header: bytes, write_model: Any) -> None:
    folder, _ = write_model()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + file.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: truncated or damaged: .*header"
    ):
        load(folder)


@pytest.fixture
def sharded(write_model: Any) -> tuple[Path, Path]:
    folder, _ = write_model("llama", max_shard_size="20KB")
    return folder, folder / "model.safetensors.index.json"


def edit_map(index: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(index.read_text())
    change(fields["weight_map"])
    index.write_text(json.dumps(fields))


def test_missing_shard(sharded: tuple[Path, Path]) -> None:
    folder, _ = sharded
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: does not exist, but model.safetens"):
        load(folder)


def test_index_naming_a_tensor_that_is_not_there(sharded: tuple[Path, Path]) -> None:
    folder, index = sharded
    edit_map(index, lambda m: m.__setitem__("ghost", m["model.norm.weight"]))
    with pytest.raises(
        CheckpointError, match=r"has no tensor ghost, which model.safetensors.index"
    ):
        load(folder)


def test_shard_holding_a_tensor_the_index_does_not_name(sharded: tuple[Path, Path]) -> None:
    folder, index = sharded
    edit_map(index, lambda m: m.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"holds tensor .*up_proj.*, which .* does not name"):
        load(folder)


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/passwd", "a/../../x", "", 7, None])
def test_index_escaping_the_folder(path: Any, sharded: tuple[Path, Path]) -> None:
    folder, index = sharded
    shutil.copy(next(folder.glob("model-*.safetensors")), folder.parent / "x.safetensors")
    edit_map(index, lambda m: m.__setitem__("model.norm.weight", path))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight: got .*, must be a file inside"
    ):
        load(folder)


def test_index_without_a_map(sharded: tuple[Path, Path]) -> None:
    folder, index = sharded
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map: must be an object"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", r"only PyTorch pickles \(pytorch_model\.bin\).*save_pretrained"),
        ("consolidated.00.pth", r"only PyTorch pickles \(consolidated"),
        ("consolidated.safetensors", r"no weights, .*found consolidated\.safetensors"),
        (None, r"has no weights, must have model\.safetensors or model\.safetensors\.index\.json$"),
    ],
)
def test_no_weights(file: str | None, message: str, write_config: Any) -> None:
    folder = write_config()
    if file:
        (folder / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_files_are_closed_after_an_error(write_model: Any) -> None:
    folder, _ = write_model("llama", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    edit_map(index, lambda m: m.__setitem__("ghost", m["model.norm.weight"]))
    maps = Path("/proc/self/maps")
    with pytest.raises(CheckpointError) as caught:
        WeightFiles(folder)
    assert str(folder) not in maps.read_text()
    assert caught.tb  # which keeps the half-made object alive until here
