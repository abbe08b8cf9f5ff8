"""Sizes follow from settings, model and device alone; what cannot be is refused by name."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from quire.config import EngineConfig
from quire.errors import InvalidConfig
from quire.model.abstract import AbstractDecoder
from quire.model.cache import cache_groups, token_bytes
from quire.model.compile import compile_threads
from quire.model.config import ModelConfig, RopeConfig
from quire.model.memory import coarse
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


QWEN_1_5B = dataclasses.replace(
    LLAMA_8B, family="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
    num_layers=28, num_heads=12, num_kv_heads=2, tied_embeddings=True, qkv_bias=True,
    rope=RopeConfig(), windows=(None,) * 28, max_positions=32768,
)  # fmt: skip


def sizes(model=LLAMA_8B, *, platform="gpu", capacity=140 * GIB, pool=None, temp=0, **settings):
    config = EngineConfig(model="x", **settings)
    dtype = config.dtype if config.dtype != "auto" else "bfloat16"
    kv = token_bytes(cache_groups(model, dtype))
    return settle(
        config,
        model,
        platform=platform,
        capacity=capacity,
        kv_token_bytes=kv,
        pool=pool,
        temp_bytes=temp,
    )


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
    table = got.memory
    assert table.kv == got.spec.num_pages * 16 * 131072
    assert table.weights == 16_060_522_496
    assert table.budget == 126 * GIB  # 90 % of the device
    # All of the budget is used, but for what keeps the count the same from start to start.
    assert 0 <= table.budget - table.total < 0.01 * table.kv
    assert got.spec.num_slots == 1024 and got.spec.ladder.max_tokens == 2048
    assert got.spec.max_model_len == 131072


def test_small_models_take_no_more_than_every_slot_can_use():
    """A 0.5B model does not take half a card: pages stop at all slots at full length."""
    small = dataclasses.replace(LLAMA_8B, num_layers=2, windows=(None,) * 2, max_positions=1024)
    got = sizes(small)
    assert got.spec.num_pages == 1 + 1024 * 1024 // 16


def test_fewer_requests_at_once_where_memory_is_short():
    assert sizes(memory=30 * GIB).spec.num_slots == 256
    assert sizes(memory=40 * GIB).spec.num_slots == 1024
    # A device may be large, and its model take most of it.
    larger = dataclasses.replace(LLAMA_8B, num_layers=84, windows=(None,) * 84)
    assert sizes(larger, memory=45 * GIB).spec.num_slots == 256
    got = sizes(max_batched_tokens=512)
    assert (got.spec.num_slots, got.spec.ladder.max_tokens) == (256, 512)
    assert "max_num_seqs is 256: half of max_batched_tokens" in got.notes
    assert not any("max_num_seqs" in note for note in sizes(max_batched_tokens=2048).notes)


def test_kv_memory_is_honoured_in_full():
    got = sizes(kv_memory=6 * GIB)
    page = 16 * got.token_bytes
    assert 6 * GIB - page < got.memory.kv <= 6 * GIB


def test_a_default_length_shrinks_to_what_fits_and_says_so():
    got = sizes(kv_memory=1 * GIB)
    assert got.spec.max_model_len == (got.spec.num_pages - 1) * 16 < 131072
    assert any("max_model_len is 8176" in note for note in got.notes)


def test_a_length_that_was_asked_for_never_shrinks():
    with pytest.raises(InvalidConfig, match=r"max_model_len: got 20000, but .* hold 8176 tokens"):
        sizes(kv_memory=1 * GIB, max_model_len=20000)
    with pytest.raises(
        InvalidConfig, match=r"must be at most 131072 \(max_position_embeddings; lift"
    ):
        sizes(max_model_len=131073)


def test_the_context_limit_is_lifted_by_name_alone_and_said():
    got = sizes(max_model_len=200_064, lift_context_limit=True)
    assert got.spec.max_model_len == 200_064 and got.spec.max_pages_per_seq == 12504
    assert any("beyond the 131072 tokens that the checkpoint was made" in n for n in got.notes)
    assert not any("beyond" in n for n in sizes(max_model_len=9, lift_context_limit=True).notes)
    rope = RopeConfig("dynamic", 10000.0, 4.0, 2048)
    model = dataclasses.replace(LLAMA_8B, rope=rope, max_positions=8192)
    with pytest.raises(InvalidConfig, match=r"at most 2048 \(dynamic rope"):
        sizes(model, max_model_len=4096, lift_context_limit=True)


def test_dynamic_rope_is_refused_beyond_its_original_length():
    rope = RopeConfig("dynamic", 10000.0, 4.0, 2048)
    model = dataclasses.replace(LLAMA_8B, rope=rope, max_positions=8192)
    assert sizes(model).spec.max_model_len == 2048
    with pytest.raises(InvalidConfig, match=r"at most 2048 \(dynamic rope"):
        sizes(model, max_model_len=4096)


def test_no_room_for_weights_is_an_error_before_anything_loads():
    with pytest.raises(InvalidConfig, match="weights take 16,060,522,496 bytes in bfloat16"):
        sizes(capacity=14 * GIB)
    with pytest.raises(InvalidConfig, match=r"max_model_len: got 131072, but .* hold 0 tokens"):
        sizes(capacity=17_750_000_000)  # beside them, not even a page


def test_cpu_serves_in_float32_and_says_so():
    got = sizes(dataclasses.replace(LLAMA_8B, num_layers=1, windows=(None,)), platform="cpu",
                capacity=16 * GIB)  # fmt: skip
    assert got.dtype == "float32"
    assert any("served in float32" in note for note in got.notes)


def test_budgets_are_related():
    with pytest.raises(InvalidConfig, match="max_batched_tokens: got 64"):
        sizes(max_num_seqs=64, max_batched_tokens=64)
    clipped = sizes(prefill_chunk=10**6)
    assert clipped.prefill_chunk == 2048
    assert any("prefill_chunk is 2048" in note for note in clipped.notes)


def test_kv_memory_beyond_the_device_is_refused_before_anything_loads():
    with pytest.raises(
        InvalidConfig, match="kv_memory: got 966,367,641,600 bytes, must be at most"
    ):
        sizes(kv_memory="900GiB")


def test_memory_bounds_everything():
    temp = GIB // 2
    got = sizes(QWEN_1_5B, memory="6GiB", temp=temp)
    table = got.memory
    assert table.budget == 6 * GIB and table.temp == temp and table.reserve > 0
    parts = (table.weights, table.kv, table.slots, table.controls, table.temp, table.staging)
    assert table.total == sum(parts) + table.reserve <= 6 * GIB
    assert 6 * GIB - table.total < 0.01 * table.kv + 16 * got.token_bytes
    assert table.kv > GIB  # there is room for tens of thousands of tokens


def test_what_programs_need_comes_out_of_the_pages():
    without, table = (sizes(temp=temp).memory for temp in (0, 4 * GIB))
    assert 3.5 * GIB < without.kv - table.kv < 5.5 * GIB


def test_the_page_count_is_the_same_from_start_to_start():
    """Neither a driver's few MiB nor a few MiB of temp make other programs."""
    counts = {sizes(capacity=140 * GIB + more * 2**20).spec.num_pages for more in (3, 90, 250)}
    assert len(counts) == 1
    assert all(coarse(n) <= n < 1.01 * coarse(n) + 1 for n in range(1, 40000, 7))
    assert len({coarse(n) for n in range(2**19, 2**20)}) <= 128


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory": "200GiB"}, "memory: got .* must be at most 150,323,855,360: what the device"),
        (
            {"memory": "12GiB"},
            "memory: got 12,884,901,888 bytes, but the model takes 17,",
        ),
        (
            {"memory": "20GiB", "kv_memory": "8GiB"},
            "kv_memory: got 8,589,934,592 bytes, must be at most .* bytes that memory allows",
        ),
        ({"memory": "20GiB", "max_model_len": 131072}, "max_model_len: .* or raise memory"),
        ({"memory": "20GiB", "pool": 10 * GIB}, "memory: got .* what JAX was started with"),
    ],
)
def test_settings_that_contradict_each_other_are_errors(settings, says):
    with pytest.raises(InvalidConfig, match=says):
        sizes(**settings)


def test_a_pool_that_jax_was_started_with_is_the_limit():
    table = sizes(pool=100 * GIB).memory
    assert 99 * GIB < table.total <= 101 * GIB


def test_on_cpu_half_of_what_weights_leave_and_memory_in_full():
    model = dataclasses.replace(LLAMA_8B, num_layers=1, windows=(None,))
    table = sizes(model, platform="cpu", capacity=16 * GIB).memory
    assert table.total <= table.weights + (16 * GIB - table.weights) // 2
    for budget in (6, 10):
        table = sizes(model, platform="cpu", capacity=16 * GIB, memory=budget * GIB).memory
        assert 0.98 * budget * GIB < table.total <= budget * GIB


def test_the_compile_pool_is_bounded_by_memory_as_well_as_cores(monkeypatch):
    cores = [64]
    monkeypatch.setattr("quire.model.compile.os", SimpleNamespace(cpu_count=lambda: cores[0]))
    assert compile_threads(32, 1000 * GIB) == 16
    assert compile_threads(32, 8 * GIB) == 3  # of about 0.55 GB, in a quarter of it
    assert compile_threads(32, GIB) == 1
    cores[0] = 2
    assert compile_threads(2, 64 * GIB) == 2
    cores[0] = 64
    assert compile_threads(32, 1000 * GIB, tuned_at_once=5) == 5
    assert compile_threads(32, 1000 * GIB, tuned_at_once=0) == 1
    assert compile_threads(32, 1000 * GIB, tuned_at_once=100) == 16
