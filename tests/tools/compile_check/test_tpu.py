"""What a TPU would run, compiled with no TPU here: attention alone, and whole steps of real models.

Each program compiles, keeps its donation, copies no slab, and stays within a bound on temp memory:
the logits, which are float32 [rows, vocabulary], and 64 MiB. Such compiles cost 2 to 60 CPU-seconds
each, most of it for the output projection of many rows; so rungs are few, the costliest are slow.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from described_engines import config_of, engine

from quire.model.config import ModelConfig, RopeConfig
from quire.model.inputs import ADMIT_ROOM
from quire.model.kernels.attention import ragged_paged_attention
from quire.model.kernels.attention.tpu import tiled
from quire.model.kernels.kv_write import write_kv
from quire.model.ladder import Sampler
from quire.model.programs import ADMIT
from quire.tools.compile_check import ProgramReport, compile_for, tpu_mesh

pytestmark = pytest.mark.xdist_group("compile for tpu")  # libtpu may be one process's at a time

MiB = 1 << 20
GiB = 1 << 30
HBM = {"v5e:2x2": 15.75 * GiB, "v6e:2x2": 31.25 * GiB}  # what XLA lets a program use

SMALL = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-6,
    rope=RopeConfig(),
    windows=(None, 128),
    max_positions=8192,
)
"""KV heads and a head dim that want padding; one layer for JAX's kernel, one for Quire's."""


@pytest.fixture(autouse=True)
def compiler(needs_compiler: Any) -> None:
    needs_compiler("tpu")


def attention_program(
    chip: str, head_dim: int, *, decode_only: bool, table: tuple[int, int] = (8, 64), **options: Any
) -> ProgramReport:
    """write_kv and attention over a slab of 8 query and 2 KV heads in bfloat16, nothing else."""
    mesh = tpu_mesh(chip)
    rows, width = table
    tokens = rows if decode_only else 64
    kv_heads, lanes = tiled(2, head_dim)

    def array(shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.everywhere)

    def program(slab: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> Any:
        pages, offsets, *batch = rest
        slab = write_kv(slab, k, v, pages, offsets, writer="tpu")
        return slab, ragged_paged_attention(
            q, slab, *batch, scale=0.1, decode_only=decode_only, backend="tpu", **options
        )

    bf16 = jnp.bfloat16
    args = (
        array((16384, 32, 2 * kv_heads, lanes), bf16),  # too large for XLA to take it into VMEM
        array((tokens, 8, lanes), bf16),
        *[array((tokens, kv_heads, lanes), bf16)] * 2,
        *[array((tokens,))] * 2,
        array((rows,)), array((rows, width)), array((rows + 1,)), array(()), array(()),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(mesh.abstract):
        lowered = jax.jit(program, donate_argnums=0).trace(*args).lower(lowering_platforms=("tpu",))
    report = compile_for(lowered, "tpu")
    slab = args[0]
    assert report.passes_over(slab) == []
    assert report.alias_bytes == slab.size * slab.dtype.itemsize
    assert report.temp_bytes < 8 * MiB
    return report


RICH = {"window": 64, "soft_cap": 30.0, "kv_scales": (1.5, 0.5), "return_lse": True}


@pytest.mark.parametrize("decode_only", [True, False], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    ("chip", "head_dim"),
    [*(("v6e:2x2", dim) for dim in (64, 80, 128, 256)), ("v5e:2x2", 128), ("v5e:2x2", 256)],
)
def test_attention(chip: str, head_dim: int, decode_only: bool) -> None:
    attention_program(chip, head_dim, decode_only=decode_only)  # JAX's kernel, save at 256
    attention_program(chip, head_dim, decode_only=decode_only, sinks=jnp.zeros(8), **RICH)


@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_other_chips(chip: str) -> None:
    attention_program(chip, 128, decode_only=False)
    attention_program(chip, 256, decode_only=False, window=64)


def test_page_tables_up_to_what_scalar_memory_holds_and_beyond() -> None:
    attention_program("v6e:2x2", 128, decode_only=True, table=(256, 896))
    attention_program("v6e:2x2", 128, decode_only=True, table=(256, 4096))


def whole_programs(
    chip: str, config: ModelConfig, num_pages: int, steps: list[tuple[int, int]]
) -> None:
    """Compiles a step of each (tokens, rows) and `admit`, and checks what the head of this file
    says."""
    mesh = tpu_mesh(chip)
    programs, spec = engine(config, mesh, page_size=32, num_pages=num_pages, rows=256, tokens=2048)
    state = programs.abstract_state()
    slab = state[0]["kv"]
    sizes = {spec.ladder.choose(t, r, Sampler.GREEDY, decode_only=t == r): None for t, r in steps}
    slab_bytes = slab.size * slab.dtype.itemsize
    copied_pages = ADMIT_ROOM.copies * slab_bytes // num_pages
    for key in [*sizes, ADMIT]:
        report = compile_for(programs.lower(key), "tpu")
        assert report.passes_over(slab) == [], key
        assert report.alias_bytes >= slab_bytes, key
        bound = copied_pages if key == ADMIT else key.rows * config.vocab_size * 4 + 64 * MiB
        assert report.temp_bytes <= bound + MiB, key
        assert report.argument_bytes + report.temp_bytes < HBM[chip], key
        if key != ADMIT:
            assert report.kernels("write_kv") == config.num_layers


def test_a_small_model_on_v6e() -> None:
    whole_programs("v6e:2x2", SMALL, 2048, [(8, 8), (64, 8)])


def test_qwen_1_5b_on_v5e() -> None:
    whole_programs("v5e:2x2", config_of("qwen2.5-1.5b"), 8192, [(8, 8), (64, 8)])


def test_llama_8b_on_v6e() -> None:
    whole_programs("v6e:2x2", config_of("llama-3.1-8b"), 2560, [(256, 256), (64, 8)])


@pytest.mark.slow
def test_the_largest_rungs() -> None:
    whole_programs("v6e:2x2", config_of("llama-3.1-8b"), 2560, [(2048, 256)])
    whole_programs("v5e:2x2", config_of("qwen2.5-1.5b"), 8192, [(256, 256), (2048, 256)])
