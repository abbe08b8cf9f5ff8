"""Kernels that programs share are what Pallas makes of them in each program."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from described_engines import config_of, engine
from jax._src.interpreters import mlir
from jax._src.pallas.triton.lowering import _new_ir_context
from jaxlib.mlir import ir, passmanager

from quire.model.abstract import AbstractDecoder
from quire.model.decoder import run_layer
from quire.model.kernels.add_norm_gpu import add_norm
from quire.model.kernels.attention import gpu, gpu_pallas
from quire.model.kernels.attention.gpu_lowered import LoweredKernels, Unknown, identity
from quire.model.kernels.attention.gpu_pallas import Launch, call
from quire.model.kernels.gemv_gpu import gemv
from quire.model.kernels.rotate_write_gpu import rotate_write
from quire.model.plan import Bucket, Sampler
from quire.model.programs import Programs
from quire.tools.compile_check import gpu_mesh

pytestmark = pytest.mark.xdist_group("compile for gpu")
GREEDY = Sampler.GREEDY
SIZES = [
    *(Bucket(n, n, GREEDY) for n in (1, 16, 64, 256)),
    *(Bucket(t, r, GREEDY) for t, r in ((64, 56), (256, 224), (1024, 256), (2048, 256))),
]
SAID = "has_side_effect", "operand_layouts", "result_layouts", "output_operand_aliases"


@pytest.fixture(autouse=True)
def compiler(needs_compiler: Callable[[str], None]) -> Iterator[None]:
    needs_compiler("gpu")
    yield
    forget_traces()


@cache
def programs(devices: int = 1) -> Programs:
    """Of two layers, one with a window; a head dim that is no power of two, group 4; a slab of more
    than 4 GiB, where one device has it."""
    config = replace(
        config_of("llama-3.1-8b"), vocab_size=4000, hidden_size=640, intermediate_size=1024,
        num_layers=2, num_heads=8, num_kv_heads=2, head_dim=80, windows=(None, 100),
    )  # fmt: skip
    sizes = {"page_size": 16, "num_pages": 1 << 18, "rows": 256, "tokens": 2048}
    _, spec = engine(config, gpu_mesh(), **sizes)
    return Programs(AbstractDecoder(config, "bfloat16", devices), spec, gpu_mesh(devices=devices))


def forget_traces() -> None:
    """A trace says nothing of where its kernels came from."""
    for traced in (run_layer, gpu._traced_once, rotate_write, add_norm):
        traced.clear_cache()


def kernels_of(lowered: Any) -> list[dict[str, str]]:
    """What each call of a kernel in a program says; of its code, what is left when constants are
    folded, whatever their order."""
    found = []

    def look(op: Any) -> Any:
        if (
            op.name == "stablehlo.custom_call"
            and "triton" in op.attributes["call_target_name"].value
        ):
            said = {name: op.attributes[name] for name in SAID if name in op.attributes}
            said |= {a.name: a.attr for a in op.attributes["mhlo.backend_config"]}
            code = said.pop("ir").value_bytes
            with _new_ir_context():
                module = ir.Module.parse(code)
                passmanager.PassManager.parse("builtin.module(canonicalize,cse)").run(
                    module.operation
                )
                lines = module.operation.get_asm(enable_debug_info=False).splitlines()
            constants = sorted(line for line in lines if "arith.constant" in line)
            rest = [line for line in lines if "arith.constant" not in line]
            found.append(
                {"code": "\n".join(constants + rest)} | {k: str(v) for k, v in said.items()}
            )
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return found


@pytest.mark.parametrize(
    ("bucket", "devices"), [*((bucket, 1) for bucket in SIZES), (SIZES[-1], 2)], ids=str
)
def test_shared_kernels_are_those_that_pallas_makes(
    bucket: Bucket, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_traces()
    shared = kernels_of(programs(devices).lower(bucket))
    known = programs(devices)._kernels._known
    assert known and None not in known.values()
    forget_traces()
    monkeypatch.setattr(LoweredKernels, "run", _refuse)
    alone = kernels_of(programs(devices).lower(bucket))
    assert [k["name"] for k in shared] == [k["name"] for k in alone] and len(shared) >= 2
    assert shared == alone


def _refuse(*_: Any) -> Any:
    raise Unknown("test")


def test_sizes_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[Any] = []
    lower = LoweredKernels._lower
    monkeypatch.setattr(
        LoweredKernels, "_lower", lambda *args: lowered.append(args) or lower(*args)
    )
    run: list[str] = []
    make = gpu_pallas.pl.pallas_call

    def noted(*args: Any, name: str, **settings: Any) -> Any:
        kernel = make(*args, name=name, **settings)
        return lambda *arrays: run.append(name) or kernel(*arrays)

    monkeypatch.setattr(gpu_pallas.pl, "pallas_call", noted)
    programs.cache_clear()
    for first, other in ((SIZES[3], SIZES[2]), (SIZES[7], SIZES[6])):
        forget_traces()
        programs().lower(first)
        known = len(lowered)
        programs().lower(other)
        assert 0 < known == len(lowered) == len(run)
    assert run.count("rotate_write") == 1


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_shared_product_of_few_tokens_is_the_one_pallas_makes(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shape(*size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.bfloat16)

    def code() -> tuple[list[dict[str, str]], int]:
        gemv.clear_cache()
        known = LoweredKernels("cuda", gpu_mesh().abstract)
        with jax.sharding.use_abstract_mesh(gpu_mesh().abstract), known.in_use():
            traced = jax.jit(partial(gemv, eps=1e-5, gated=True)).trace(
                shape(tokens, 320), shape(192, 320),
                scale=shape(320), bias=shape(192), residual=shape(tokens, 96),
            )  # fmt: skip
            return kernels_of(traced.lower(lowering_platforms=("cuda",))), len(known._known)

    shared, known = code()
    monkeypatch.setattr(LoweredKernels, "run", _refuse)
    alone, unknown = code()
    assert (known, unknown) == (1, 0)
    assert shared == alone and len(shared) == 1


@dataclass(frozen=True)
class Scaled:
    by: float


def scaling(how: Any, used: Callable[[Any], Any] = lambda x: x) -> Callable[..., None]:
    def kernel(x: Any, y: Any) -> None:
        y[1, 0] = used(x[1, 0] * getattr(how, "by", how))

    return kernel


def code_of(kernels: LoweredKernels, kernel: Callable[..., None], **other: Any) -> tuple[str, int]:
    """How a kernel stands in a program, and how many have been lowered."""
    settings = {"launch": Launch(False, 1, 1), "grid": (2, 2), "columns": 4} | other
    array = jax.ShapeDtypeStruct((8, settings["columns"]), jnp.float32)

    def program(x: jax.Array) -> Any:
        launch, grid = settings["launch"], settings["grid"]
        return call(
            kernel, launch, name="scale", grid=grid, out=[array], args=[x], any_rows=True,
        )  # fmt: skip

    with jax.sharding.use_abstract_mesh(gpu_mesh().abstract), kernels.in_use():
        lowered = jax.jit(program).trace(array).lower(lowering_platforms=("cuda",))
    return str(kernels_of(lowered)), len(kernels._known)


def test_kernels_are_told_apart_by_all_that_they_see() -> None:
    """A constant, also in a dataclass or function that the closure holds; launch, grid, shapes."""
    known = LoweredKernels("cuda", gpu_mesh().abstract)
    first = code_of(known, scaling(2))
    assert first[1] == 1 and code_of(known, scaling(2)) == first
    others = [
        code_of(known, scaling(2.0 + 1)), code_of(known, scaling(Scaled(4.0))),
        code_of(known, scaling(Scaled(5.0))), code_of(known, scaling(2, used=lambda x: x + 1)),
        code_of(known, scaling(2), launch=Launch(False, 2, 1)),
        code_of(known, scaling(2), grid=(2, 1)), code_of(known, scaling(2), columns=16),
    ]  # fmt: skip
    assert len({code for code, _ in (first, *others)}) == others[-1][1] == len(others) + 1


def test_the_grid_is_each_calls_own() -> None:
    known = LoweredKernels("cuda", gpu_mesh().abstract)
    one, other = (code_of(known, scaling(2), grid=(2, n)) for n in (3, 5))
    assert one[1] == other[1] == 1
    assert "'grid_y': '3 : i32'" in one[0] and "'grid_y': '5 : i32'" in other[0]
    assert one[0].replace("3 : i32", "5 : i32") == other[0]


def test_what_cannot_be_told_apart_is_lowered_where_it_is_used() -> None:
    class Opaque:
        by = 3.0

    known = LoweredKernels("cuda", gpu_mesh().abstract)
    with pytest.raises(Unknown):
        identity(scaling(Opaque()))
    code, count = code_of(known, scaling(Opaque()))
    assert count == 0 and "scale" in code
    # Past what the second axis of a grid holds, where axes lie is in the code.
    code, count = code_of(known, scaling(2), grid=(2, 2**16))
    assert count == 0 and "131072" in code


@cache
def by_mosaic() -> Programs:
    config = replace(
        config_of("llama-3.1-8b"), vocab_size=4000, hidden_size=640, intermediate_size=1024,
        num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, windows=(None, 100),
    )  # fmt: skip
    sizes = {"page_size": 16, "num_pages": 8192, "rows": 256, "tokens": 2048}
    return engine(config, gpu_mesh(), **sizes)[0]


def mosaic_calls(lowered: Any) -> list[tuple[dict[str, str], bytes]]:
    """What each call of a kernel by Mosaic says besides its code, and its code."""
    found = []

    def look(op: Any) -> Any:
        if (
            op.name == "stablehlo.custom_call"
            and "mosaic" in op.attributes["call_target_name"].value
        ):
            said = {a.name: a.attr for a in op.attributes["mhlo.backend_config"]}
            code = said.pop("module").value_bytes
            del said["kernel_hash"]
            said |= {name: op.attributes[name] for name in op.attributes}
            del said["mhlo.backend_config"]
            types = str([x.type for x in (*op.operands, *op.results)])
            found.append(({k: str(v) for k, v in said.items()} | {"types": types}, code))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return found


def instructions(code: bytes) -> Counter[str]:
    """The lines of a kernel by Mosaic, values without their numbers and lists without a length."""
    from jax._src.lib import mosaic_gpu_dialect

    with mlir.make_ir_context() as context:
        mosaic_gpu_dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        text = ir.Module.parse(code).operation.get_asm(enable_debug_info=False)
    text = re.sub(r"%\w+|#map\d*", "%", text)
    return Counter(re.sub(LIST, r"memref<?\1", text).splitlines())


LIST = r"memref<\d+((x\d+)?xi32\b)"
OF_SIZES = re.compile(
    r"mlir.constant|arith.constant.*: i64|from_kernel_arg_idx = [2-5] : |dump_basename"
)
"""Lines of the host's part that name the length of a list; and of the kernel's number."""

with_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic's kernel needs JAX 0.11"
)


@with_mosaic
def test_the_shared_kernel_by_mosaic_is_the_one_pallas_makes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But for lengths of arrays that it reads by index."""
    bucket = Bucket(1024, 256, GREEDY)
    forget_traces()
    shared = mosaic_calls(by_mosaic().lower(bucket))
    forget_traces()
    monkeypatch.setattr(LoweredKernels, "run_built_alone", _refuse)
    alone = mosaic_calls(by_mosaic().lower(bucket))
    assert len(shared) == 2 and [said for said, _ in shared] == [said for said, _ in alone]
    for (_, code), (_, other) in zip(shared, alone, strict=True):
        a, b = instructions(code), instructions(other)
        assert 1000 < a.total() == pytest.approx(b.total(), abs=4)
        differ = [line for line in (a - b) + (b - a) if not OF_SIZES.search(line)]
        assert differ == []


@with_mosaic
def test_steps_of_as_many_tokens_share_their_kernel_by_mosaic() -> None:
    """To the byte, by which XLA knows it; another number of tokens, or window, has another. They
    can be built before the programs."""
    of, alone = {}, 0
    by_mosaic.cache_clear()
    for tokens, rows in ((1024, 256), (1024, 64), (768, 256)):
        forget_traces()
        of[tokens, rows] = [code for _, code in mosaic_calls(by_mosaic().lower(
            Bucket(tokens, rows, GREEDY)
        ))]  # fmt: skip
        alone += len(by_mosaic().take_kernels())
    assert of[1024, 256] == of[1024, 64]
    assert alone == 4 and not by_mosaic().take_kernels()
    assert len({*of[1024, 256], *of[768, 256]}) == 4
