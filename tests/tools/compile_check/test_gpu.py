"""Whole step programs compiled for an H200 that is not there: memory, copies, launches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import pytest
from described_engines import config_of, engine

from quire.config import EngineConfig
from quire.model.abstract import AbstractDecoder
from quire.model.compile import compile_all, compiler_options
from quire.model.config import ModelConfig
from quire.model.devices import DeviceMemory
from quire.model.inputs import ADMIT_ROOM
from quire.model.kernels import switches
from quire.model.kernels.attention.gpu_decode import DecodeShape
from quire.model.memory import PLATFORMS
from quire.model.plan import Bucket, RunnerSpec, Sampler
from quire.model.pool_holes import LARGEST_HOLE
from quire.model.programs import ADMIT, Programs, SampleKey
from quire.model.sampling.choose import rows_at_once
from quire.model.startup import Need, Startup, _need, guessed_need
from quire.tools.compile_check import ProgramReport, compile_for, gpu_mesh

PAGE, NUM_PAGES, ROWS, TOKENS = PLATFORMS["gpu"].page_size, 8192, 256, 2048
DECODE, MIXED = Bucket(ROWS, ROWS, Sampler.GREEDY), Bucket(TOKENS, ROWS, Sampler.GREEDY)
ONE = Bucket(1, 1, Sampler.GREEDY)
pytestmark = pytest.mark.xdist_group("compile for gpu")  # programs are compiled once a process
SLACK = 4 << 20
"""For what is small and many: the page table of a step, the plan of the attention, rotations."""
WORKSPACE = 32 << 20
"""What the vendor's matrix products may work in."""


def small() -> ModelConfig:
    """Two layers, one of them with a window, a head dim that is no power of two, group 4."""
    return replace(
        config_of("llama-3.1-8b"), vocab_size=4000, hidden_size=640, intermediate_size=1024,
        num_layers=2, num_heads=8, num_kv_heads=2, head_dim=80, windows=(None, 100),
    )  # fmt: skip


CONFIGS = {"small": small, "llama-3.1-8b": lambda: config_of("llama-3.1-8b")}


@pytest.fixture(autouse=True)
def compiler(needs_compiler: Callable[[str], None]) -> None:
    needs_compiler("gpu")


SIZES = {"page_size": PAGE, "num_pages": NUM_PAGES, "rows": ROWS, "tokens": TOKENS}


@cache
def programs(model: str) -> tuple[Programs, RunnerSpec, ModelConfig]:
    config = CONFIGS[model]()
    return *engine(config, gpu_mesh(), **SIZES), config


@cache
def report(model: str, key: Any) -> ProgramReport:
    tokens = key.tokens if isinstance(key, Bucket) else 0
    return compile_for(programs(model)[0].lower(key), "gpu", tokens)


def test_programs_are_checked_as_an_engine_compiles_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With XLA's options for a device, or figures and copies would be another program's."""
    given: list[dict[str, Any]] = []

    def stop(_: Any, options: dict[str, Any]) -> None:
        given.append(options)
        raise InterruptedError

    monkeypatch.setattr("quire.tools.compile_check.report.compile_uncached", stop)
    with pytest.raises(InterruptedError):
        compile_for(programs("small")[0].lower(ADMIT), "gpu")
    assert compiler_options("cuda") and compiler_options("gpu").items() <= given[0].items()


def test_results_of_xlas_own_kernels_are_held_against_each_other() -> None:
    """Of kernels that it tries; the vendor's are taken as they are."""
    assert "xla_gpu_autotune_level" not in compiler_options("gpu", 63)
    assert compiler_options("gpu", 64)["xla_gpu_autotune_level"] < 4


def test_products_of_many_tokens_are_the_vendors() -> None:
    """And of few XLA's own compete. The engine compiles one step of each number of tokens well
    before the others with the same products, and those of few first."""
    assert 'custom_call_target="__cublas' in report("small", DECODE).hlo
    made, spec, _ = programs("small")
    buckets = [key for key in made.lowerings() if isinstance(key, Bucket)]
    own = [
        b for b in buckets if not made.compiler_options(b).keys() & {"xla_gpu_enable_triton_gemm"}
    ]
    assert {b.tokens for b in own} == {b.tokens for b in spec.ladder.buckets if b.tokens < 64}
    greedy = [b for b in buckets if b.sampler == Sampler.GREEDY]
    assert buckets[: len(greedy)] == greedy
    assert {b.tokens for b in greedy[:4]} == {b.tokens for b in own}
    sizes = {b.tokens for b in greedy}
    assert {b.tokens for b in greedy[: len(sizes)]} == sizes and len(greedy) > len(sizes)


def nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def temp_bound(config: ModelConfig, bucket: Bucket) -> int:
    """Either the logits of all rows in float32, or what one layer holds of all tokens in bfloat16;
    WORKSPACE; and the attention's partial sums: (rows + split budget) × heads × (D, m and l)."""
    logits = bucket.rows * config.vocab_size * 4
    of_a_token = 3 * config.intermediate_size + 4 * config.hidden_size
    of_a_token += 2 * config.q_size + 2 * config.kv_size
    items = bucket.rows + DecodeShape().programs // config.num_kv_heads
    partial_sums = items * config.num_heads * (config.head_dim + 2) * 4
    return max(logits, bucket.tokens * of_a_token * 2) + partial_sums + WORKSPACE + SLACK


KEYS = {"decode": DECODE, "mixed": MIXED, "admit": ADMIT}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("model", CONFIGS)
def test_state_is_updated_in_place(model: str, key: str) -> None:
    """No instruction copies a slab or works through it, and donated state is written where it
    lay."""
    state = programs(model)[0].abstract_state()
    got = report(model, KEYS[key])
    assert got.passes_over(state[0]["kv"]) == []
    assert got.alias_bytes >= nbytes(state)


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("model", CONFIGS)
def test_temporary_memory_has_a_bound(model: str, bucket: Bucket) -> None:
    assert report(model, bucket).temp_bytes <= temp_bound(programs(model)[2], bucket)


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("model", CONFIGS)
def test_memory_that_is_guessed_is_enough(model: str, bucket: Bucket) -> None:
    need = guessed_need(CONFIGS[model](), "bfloat16", bucket.rows, bucket.tokens)
    assert report(model, bucket).temp_bytes <= need.temp


def test_sampling_works_in_the_logits() -> None:
    """FULL on a quarter of the rows at a time, with two arrays as large as their logits."""
    assert report("llama-3.1-8b", SampleKey(ROWS, Sampler.SAMPLE)).temp_bytes <= SLACK
    logits = rows_at_once(ROWS) * CONFIGS["llama-3.1-8b"]().vocab_size * 4
    temp = report("llama-3.1-8b", SampleKey(ROWS, Sampler.FULL)).temp_bytes
    assert logits < temp <= 2 * logits + SLACK


# Logits read and written, and read in one round of the search for top-k and top-p. FULL also reads
# the counts of tokens, which are half as large; in parts (of the largest programs) it copies each.
PASSES = {
    (1, Sampler.SAMPLE): (4, 1, 3),
    (64, Sampler.SAMPLE): (3, 0, 1),
    (ROWS, Sampler.SAMPLE): (3, 0, 1),
    (1, Sampler.FULL): (9.5, 2, 3),
    (64, Sampler.FULL): (8.5, 1, 1),
    (ROWS, Sampler.FULL): (9.5, 2, 1),
}


@pytest.mark.parametrize(("rows", "sampler"), PASSES)
def test_passes_over_the_logits(rows: int, sampler: Sampler) -> None:
    vocab = CONFIGS["llama-3.1-8b"]().vocab_size
    at_once = min(rows, rows_at_once(ROWS)) if sampler == Sampler.FULL else rows
    got = report("llama-3.1-8b", SampleKey(rows, sampler)).traffic(
        jax.ShapeDtypeStruct((at_once, vocab), "float32")
    )
    print(f"{rows} {sampler.name}: {got}")
    read, written, a_round = (n * rows * vocab * 4 for n in PASSES[rows, sampler])
    assert got.read <= read and got.written <= written and got.read_a_round <= a_round
    assert got.read >= 3 * rows * vocab * 4 and got.read_a_round > 0  # it is these that are seen


@pytest.mark.parametrize("model", CONFIGS)
def test_copying_pages_needs_one_copy_of_them(model: str) -> None:
    """`admit` copies ADMIT_ROOM's pages through a buffer of their own, and nothing else."""
    state = programs(model)[0].abstract_state()[0]["kv"]
    page = math.prod(state.shape[1:]) * 2 * programs(model)[2].num_layers
    assert report(model, ADMIT).temp_bytes <= ADMIT_ROOM.copies * page + SLACK


@pytest.mark.parametrize("bucket", [ONE, DECODE, MIXED], ids=["one", "decode", "mixed"])
@pytest.mark.parametrize("model", CONFIGS)
def test_a_greedy_step_is_one_launch(model: str, bucket: Bucket) -> None:
    """The whole step is one command buffer (CUDA graph), Pallas kernels included."""
    assert report(model, bucket).thunks == ["CommandBuffer"]


def test_a_sampling_step_breaks_at_its_search_only() -> None:
    """The search for what top-k and top-p keep is a loop that the host runs: XLA captures no
    `while`, unless it is told to."""
    assert report("small", replace(DECODE, sampler=Sampler.FULL)).thunks == ["CommandBuffer"]
    broken = ["CommandBuffer", "While", "CommandBuffer"]
    for rows in (1, 64, ROWS):  # FULL with the most: around all, for some rows at a time
        for sampler in (Sampler.SAMPLE, Sampler.FULL):
            assert report("llama-3.1-8b", SampleKey(rows, sampler)).thunks == broken


@pytest.mark.parametrize("sampler", [Sampler.SAMPLE, Sampler.FULL])
def test_sampling_is_one_launch_where_the_device_runs_its_search(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switches, "SEARCH_BY", "graph")
    made, key = programs("small")[0], SampleKey(64, sampler)
    got = compile_for(made.lower(key), "gpu", options=made.compiler_options(key))
    assert got.thunks == ["CommandBuffer"]
    check_few_kernels_use_what_moves(got)
    assert made.compiler_options(DECODE) == compiler_options("gpu", ROWS)  # no other program's


def few_layers(model: str, bucket: Bucket) -> ProgramReport:
    config = replace(config_of(model), num_layers=4, windows=(None,) * 4)
    made, _ = engine(config, gpu_mesh(), **SIZES)
    return compile_for(made.lower(bucket), "gpu", bucket.tokens)


def check_few_kernels_use_what_moves(got: ProgramReport) -> None:
    """One copies the inputs, one makes room for the results, one fills it: layers use neither."""
    assert len(got.uses_of_inputs()) == 1
    assert len(got.uses_of_new_results()) == 2


@pytest.mark.parametrize("bucket", [ONE, DECODE, MIXED], ids=["one", "decode", "mixed"])
@pytest.mark.parametrize("model", CONFIGS)
def test_few_kernels_use_what_moves_from_step_to_step(model: str, bucket: Bucket) -> None:
    """Each that does has its node of the CUDA graph written anew at every launch."""
    check_few_kernels_use_what_moves(report(model, bucket))


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 1), (64, 64), (32, 8), (128, 112), (1024, 64), (2048, 64)]
)
def test_nor_at_other_rungs(tokens: int, rows: int) -> None:
    bucket = Bucket(tokens, rows, Sampler.GREEDY)
    check_few_kernels_use_what_moves(few_layers("qwen2.5-1.5b", bucket))


def test_nor_in_steps_of_several_tokens() -> None:
    check_few_kernels_use_what_moves(few_layers("qwen2.5-1.5b", Bucket(8, 8, Sampler.GREEDY, k=4)))


@pytest.mark.parametrize("rows", [1, 64, ROWS])
@pytest.mark.parametrize("sampler", [Sampler.SAMPLE, Sampler.FULL])
def test_nor_in_programs_that_sample(rows: int, sampler: Sampler) -> None:
    """What they are sent is which rows a forward ran; the logits come as one of its arguments."""
    check_few_kernels_use_what_moves(report("llama-3.1-8b", SampleKey(rows, sampler)))


@pytest.mark.parametrize("bucket", [ONE, DECODE, MIXED], ids=["one", "decode", "mixed"])
def test_nor_in_forwards_apart_but_for_what_is_large(bucket: Bucket) -> None:
    """Logits and hidden states are as large as what they work in, which XLA keeps there too; they
    are cut off the same piece of the pool each time (model/pool_holes.py)."""
    got = report("llama-3.1-8b", replace(bucket, sampler=Sampler.FULL))
    assert len(got.uses_of_inputs()) == 1
    assert len(got.uses_of_new_results(below=LARGEST_HOLE)) == 2


def kernels(model: str, layers: int, bucket: Bucket) -> set[str]:
    """Names of the kernels in a program of so many layers of a model, each of which is compiled."""
    config = replace(CONFIGS[model](), num_layers=layers, windows=(None,) * layers)
    made, _ = engine(config, gpu_mesh(), **SIZES)
    return set(compile_for(made.lower(bucket), "gpu", bucket.tokens).launched)


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
def test_layers_share_their_kernels(bucket: Bucket) -> None:
    """Another layer is not another kernel to compile. (The first layer and the last may differ.)"""
    few, more = kernels("small", 3, bucket), kernels("small", 5, bucket)
    assert 15 < len(few) == len(more)


def test_own_kernels_are_used() -> None:
    layers = programs("llama-3.1-8b")[2].num_layers
    decode, mixed = report("llama-3.1-8b", DECODE), report("llama-3.1-8b", MIXED)
    assert decode.kernels("attention_decode") == mixed.kernels("attention_decode") == layers
    assert decode.kernels("attention_prefill") == 0
    assert mixed.kernels("attention_prefill") == layers
    assert mixed.kernels("attention_prefill_mosaic") == (layers if MOSAIC_IS_HERE else 0)


MOSAIC_IS_HERE = jax.__version_info__ >= (0, 11)


@pytest.mark.parametrize("attention", [None, "gpu_mosaic"])
def test_prompts_of_large_steps_are_mosaics_where_that_can_serve(attention: str | None) -> None:
    """Not those of small steps, unless that backend is asked for; nor any on an older JAX, or of
    another head dim."""
    config = replace(small(), head_dim=64, num_heads=12)
    made, _ = engine(config, gpu_mesh(), **SIZES, attention=attention)

    def by_mosaic(bucket: Bucket) -> bool:
        return "mosaic_gpu" in made.lower(bucket).as_text()

    assert by_mosaic(Bucket(768, 256, Sampler.GREEDY)) == MOSAIC_IS_HERE
    assert by_mosaic(Bucket(512, 256, Sampler.GREEDY)) == (MOSAIC_IS_HERE and attention is not None)
    assert not by_mosaic(DECODE)
    assert "mosaic_gpu" not in report("small", MIXED).hlo


@pytest.mark.skipif(not MOSAIC_IS_HERE, reason="Mosaic's kernel needs JAX 0.11")
def test_prompts_by_mosaic_are_no_less_in_place_and_one_launch() -> None:
    """The kernel is built to the last instruction, by wgmma and TMA."""
    config = replace(small(), head_dim=64)
    made, _ = engine(config, gpu_mesh(), **SIZES)
    got = compile_for(made.lower(MIXED), "gpu")
    assert "mosaic_gpu" in got.hlo
    check_in_place_and_one_launch(made, config, MIXED, got)


def check_in_place_and_one_launch(
    made: Programs, config: ModelConfig, bucket: Bucket, got: ProgramReport
) -> None:
    state = made.abstract_state()
    assert got.passes_over(state[0]["kv"]) == []
    assert got.alias_bytes >= nbytes(state)
    assert got.thunks == ["CommandBuffer"]
    assert got.temp_bytes <= temp_bound(config, bucket)


@pytest.mark.parametrize("attention", ["gpu_merge_inside", "gpu_stream"])
def test_parts_merged_inside_are_no_less_in_place_and_one_launch(attention: str) -> None:
    made, _ = engine(small(), gpu_mesh(), **SIZES, attention=attention)
    got = compile_for(made.lower(DECODE), "gpu", DECODE.tokens)
    check_in_place_and_one_launch(made, small(), DECODE, got)
    assert got.kernels("attention_decode") == small().num_layers
    assert got.kernels("attention_merge") == 0


def launches_a_layer(model: str, bucket: Bucket, **kernels: str) -> Counter[str]:
    """What the third layer adds to two."""

    def launched(layers: int) -> Counter[str]:
        config = replace(config_of(model), num_layers=layers, windows=(None,) * layers)
        made, _ = engine(config, gpu_mesh(), **SIZES, **kernels)
        got = compile_for(made.lower(bucket), "gpu", bucket.tokens)
        check_in_place_and_one_launch(made, config, bucket, got)
        # Digits and underscores at the end tell apart fusions of one kind.
        return Counter(name.rstrip("_0123456789") for name in got.launched)

    few, more = launched(2), launched(3)
    assert not few - more
    return more - few


def test_own_kernels_around_the_products_leave_few_launches() -> None:
    """And are no less in place, nor another launch of the host's."""
    own = {"writer": "gpu", "projection": "gemv", "attention": "gpu_merge_inside"}
    measured = launches_a_layer("qwen2.5-1.5b", ONE, **own)
    assert measured["gemv"] == 3 and measured["rotate_write"] == measured["attention_decode"] == 1
    assert measured.total() == 7
    not_measured = launches_a_layer("llama-3.1-8b", ONE, **own)
    assert not not_measured["gemv"] and not_measured["add_norm"] == 2
    assert not_measured.total() == 12
    few = launches_a_layer("llama-3.1-8b", Bucket(16, 16, Sampler.GREEDY), **own)
    assert few["add_norm"] == 2 and few["rotate_write"] == few["attention_decode"] == 1
    # Four products and the gate; what is left in parts is summed where it is read.
    assert few.total() == 9 and not few["loop_reduce_fusion"]


def test_many_tokens_rotate_and_write_in_one_kernel() -> None:
    made, _ = engine(small(), gpu_mesh(), **SIZES, writer="gpu", projection="gemv")
    got = compile_for(made.lower(MIXED), "gpu", MIXED.tokens)
    check_in_place_and_one_launch(made, small(), MIXED, got)
    assert got.kernels("rotate_write") == small().num_layers
    assert got.kernels("gemv") == got.kernels("add_norm") == 0


@pytest.mark.parametrize("bucket", [ONE, DECODE, MIXED], ids=["one", "decode", "mixed"])
def test_kernels_that_are_switched_off_are_in_no_program(bucket: Bucket) -> None:
    got = report("llama-3.1-8b", bucket)  # which all of them can serve
    assert switches.PROJECTION == "gemv" or got.kernels("gemv") == 0
    assert switches.PROJECTION != "xla" or got.kernels("add_norm") == 0
    assert (got.kernels("rotate_write") > 0) == (switches.WRITER == "gpu")
    assert switches.PROMPTS_BY == "mosaic" or "mosaic_gpu" not in got.hlo
    assert (got.kernels("attention_merge") == 0) == (switches.MERGE_INSIDE or bucket == ONE)


def test_qwens_pages_inside_six_gib() -> None:
    """All but 276 MB of what weights, the reserve and controls leave. What programs work in does
    not depend on the layers: each works where the one before did."""
    config = config_of("qwen2.5-1.5b")
    spec = starting(config)._settle(Need()).spec
    few = replace(config, num_layers=2, windows=(None, None))
    made = Programs(AbstractDecoder(few, "bfloat16"), spec, gpu_mesh())
    got = compile_all(
        {key: partial(made.lower, key) for key in made.demanding},
        threads=2,
        options=lambda key: made.compiler_options(key) | {"xla_gpu_autotune_level": 0},
        devices=gpu_mesh().devices,
    )
    table = starting(config)._settle(_need(made, got)).memory
    print(*table.rows(), sep="\n")
    assert table.temp + table.staging < 285e6 and table.temp > table.staging
    assert table.pages >= 2200 and table.total <= 6 << 30


def starting(config: ModelConfig, **settings: Any) -> Startup:
    """An engine inside 6 GiB of an H200."""
    settings = {"model": "x", "memory": 6 << 30, **settings}
    memory = DeviceMemory(150055419904, None)
    return Startup(EngineConfig(**settings), config, gpu_mesh(), memory, None)


def test_compilations_at_once_fit_their_products_beside_the_weights() -> None:
    def at_once(**settings: Any) -> int | None:
        return starting(config_of("qwen2.5-1.5b"), **settings).tuned_at_once

    # 6 GiB less 2.875 of weights and 0.875 in reserve; 0.435 for the embedding, 0.145 for logits.
    assert at_once() == 3
    assert at_once(memory=12 << 30) == 14
    assert at_once(max_num_seqs=128) == 4
