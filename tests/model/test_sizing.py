"""Sizes follow from settings, model and device alone; what cannot be is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from quire.config import EngineConfig
from quire.errors import InvalidConfig
from quire.model.abstract import AbstractDecoder
from quire.model.cache import cache_groups, token_bytes
from quire.model.config import ModelConfig, RopeConfig
from quire.model.sizing import count_parameters, settle, weight_bytes

GIB = 2**30

LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeConfig("llama3", 500000.0, 8.0, 8192),
    windows=(None,) * 32,
    max_positions=131072,
)


def sizes(model=LLAMA_8B, *, platform="gpu", capacity=140 * GIB, **settings):
    config = EngineConfig(model="x", **settings)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16"
    kv = token_bytes(cache_groups(model, dtype))
    return settle(config, model, platform=platform, capacity=capacity, kv_token_bytes=kv)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True},
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
        {"qk_norm": True, "head_dim": 64},
    ],
    ids=str,
)
def test_parameters_are_counted_without_building_them(changes):
    model = dataclasses.replace(LLAMA_8B, num_layers=2, windows=(None,) * 2, **changes)
    specs = AbstractDecoder(model, "bfloat16").specs
    assert weight_bytes(model, "bfloat16") == sum(spec.nbytes for spec in specs.values())
    assert weight_bytes(model, "float32") == 4 * count_parameters(model)


def test_llama_8b_by_the_numbers():
    got = sizes()
    assert count_parameters(LLAMA_8B) == 8_030_261_248
    assert got.token_bytes == 131072  # 2 · 8 heads · 128 · 2 bytes · 32 layers
    assert got.kv_bytes == got.spec.num_pages * 32 * 131072
    assert got.kv_bytes <= (got.capacity - got.weight_bytes) // 2
    assert got.spec.num_slots == 256 and got.spec.ladder.max_tokens == 2048
    assert got.spec.max_model_len == 131072


def test_small_models_take_no_more_than_every_slot_can_use():
    """A 0.5B model does not take half a card: pages stop at all slots at full length."""
    small = dataclasses.replace(LLAMA_8B, num_layers=2, windows=(None,) * 2, max_positions=1024)
    got = sizes(small)
    assert got.spec.num_pages == 1 + 256 * 1024 // 32


def test_kv_memory_is_honoured_in_full():
    got = sizes(kv_memory=6 * GIB)
    page = 32 * got.token_bytes
    assert 6 * GIB - page < got.kv_bytes <= 6 * GIB


def test_a_default_length_shrinks_to_what_fits_and_says_so():
    got = sizes(kv_memory=1 * GIB)
    assert got.spec.max_model_len == (got.spec.num_pages - 1) * 32 < 131072
    assert any("max_model_len is 8160" in note for note in got.notes)


def test_a_length_that_was_asked_for_never_shrinks():
    with pytest.raises(InvalidConfig, match=r"max_model_len: got 20000, but .* hold 8160 tokens"):
        sizes(kv_memory=1 * GIB, max_model_len=20000)
    with pytest.raises(InvalidConfig, match=r"must be at most 131072 \(max_position_embeddings\)"):
        sizes(max_model_len=131073)


def test_dynamic_rope_is_refused_beyond_its_original_length():
    rope = RopeConfig("dynamic", 10000.0, 4.0, 2048)
    model = dataclasses.replace(LLAMA_8B, rope=rope, max_positions=8192)
    assert sizes(model).spec.max_model_len == 2048
    with pytest.raises(InvalidConfig, match=r"at most 2048 \(dynamic rope"):
        sizes(model, max_model_len=4096)


def test_no_room_for_weights_is_an_error_before_anything_loads():
    with pytest.raises(InvalidConfig, match="weights take 16,060,522,496 bytes in bfloat16"):
        sizes(capacity=14 * GIB)
    with pytest.raises(InvalidConfig, match="kv_memory"):  # beside them, not even a page
        sizes(capacity=16_060_522_497)


def test_cpu_serves_in_float32_and_says_so():
    got = sizes(dataclasses.replace(LLAMA_8B, num_layers=1, windows=(None,)), platform="cpu",
                capacity=16 * GIB)  # fmt: skip
    assert got.dtype == "float32"
    assert any("served in float32" in note for note in got.notes)


def test_budgets_are_related():
    with pytest.raises(InvalidConfig, match="max_batched_tokens: got 64"):
        sizes(max_num_seqs=64, max_batched_tokens=64)
    assert sizes(prefill_chunk=10**6).prefill_chunk == 2048


def test_kv_memory_beyond_the_device_is_refused_before_anything_loads():
    with pytest.raises(
        InvalidConfig, match="kv_memory: got 966,367,641,600 bytes, must be at most"
    ):
        sizes(kv_memory="900GiB")
