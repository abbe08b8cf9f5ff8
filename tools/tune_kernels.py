"""`python -P -m quire.tools.tune_kernels`: shapes that the GPU's attention kernels are fast with.

For whoever chooses them, in kernels/attention/gpu.py: on a GPU, every candidate runs every case,
and its error against float64 stands beside its time. A case is a step as the engine has it: the
page table is as wide as a long context needs, and there is room for as many rows as its rung has.
Prints a table and the best of each case, and writes all of it as JSON.

    --compile-only   compiles every candidate for an H200 that need not be here, and runs none
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from ..model.kernels.attention.contract import Extras, Options, RaggedBatch
from ..model.kernels.attention.gpu import attend
from ..model.kernels.attention.gpu_decode import DecodeShape
from ..model.kernels.attention.gpu_mosaic import MosaicShape
from ..model.kernels.attention.gpu_prefill import PrefillShape
from ..model.kernels.attention.gpu_stream import StreamShape
from .bench.kernel_cases import Case, Inputs, float64_error, make_inputs
from .compile_check import compile_for, gpu_mesh

LAYERS = 8  # calls in one program, each over its own copy of K and V
MAX_PAGES = 4096  # of a row: 131,072 tokens
SHAPES = DecodeShape | StreamShape | PrefillShape | MosaicShape

_QWEN: dict[str, Any] = {"heads": 12, "kv_heads": 2}
CASES = {
    "prefill": [
    Case(rows=1, context=10_000, queries=64), Case(rows=1, context=10_000, queries=16),
    Case(rows=1, context=128, queries=128), Case(rows=1, context=512, queries=512),
    Case(rows=1, context=8704, queries=512), Case(rows=1, context=1024, queries=1024),
    Case(rows=1, context=2048, queries=2048), Case(rows=1, context=8192, queries=2048),
    Case(rows=8, context=256, queries=256), Case(rows=1, context=10_000, queries=16, **_QWEN),
    Case(rows=1, context=8192, queries=8192),
    ],
    "decode": [
    Case(rows=1, context=272), Case(rows=1, context=8192), Case(rows=64, context=272),
    Case(rows=256, context=272), Case(rows=256, context=1024, ragged=True),
    Case(rows=1024, context=600, ragged=True), Case(rows=8, context=32768),
    Case(rows=1, context=272, **_QWEN), Case(rows=64, context=272, **_QWEN),
    Case(rows=1024, context=600, ragged=True, **_QWEN),
    ],
}  # fmt: skip

_TILE = PrefillShape(queries=128, block=64, num_warps=8, num_stages=3)
_SMALL = PrefillShape(queries=64, block=64, num_warps=4, num_stages=3, programs=264)
_DECODE = DecodeShape()
_STREAM = StreamShape()
CANDIDATES: dict[str, list[SHAPES]] = {
    "prefill": [
        _TILE,
        replace(_TILE, num_stages=2), replace(_TILE, num_stages=4),
        replace(_TILE, block=32, num_stages=4), replace(_TILE, block=128, num_stages=2),
        replace(_TILE, queries=256, num_stages=2), replace(_TILE, queries=256, num_warps=16),
        replace(_TILE, least_blocks=8), replace(_TILE, programs=264, least_blocks=8),
        _SMALL,
        replace(_SMALL, num_stages=4), replace(_SMALL, block=32, num_stages=4),
        replace(_SMALL, least_blocks=8), replace(_SMALL, least_blocks=4),
        replace(_SMALL, queries=32, least_blocks=8), replace(_SMALL, programs=528, least_blocks=4),
        MosaicShape(), MosaicShape(least_blocks=4),
        MosaicShape(block=64, num_stages=4, least_blocks=16),
    ],
    "decode": [
        _DECODE,
        replace(_DECODE, merge_inside=not _DECODE.merge_inside),
        replace(_DECODE, num_warps=1), replace(_DECODE, num_warps=4),
        replace(_DECODE, num_stages=3), replace(_DECODE, num_stages=6),
        replace(_DECODE, block=64, num_warps=4, num_stages=3), replace(_DECODE, block=16),
        replace(_DECODE, programs=264), replace(_DECODE, programs=1056),
        replace(_DECODE, least_blocks=2), replace(_DECODE, least_blocks=8),
        _STREAM,
        replace(_STREAM, num_stages=3, programs=528), replace(_STREAM, num_stages=5, programs=264),
        replace(_STREAM, block=64, num_warps=4, num_stages=3, programs=264),
        replace(_STREAM, least_blocks=1), replace(_STREAM, least_blocks=2),
    ],
}  # fmt: skip


def program(case: Case, shape: SHAPES) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """LAYERS calls, each of whose results are the next one's queries; gives the last and the first
    result."""
    decode = case.queries == 1
    options = Options(
        scale=case.head_dim**-0.5, first_page=0, window=None, soft_cap=None, decode_only=decode,
        return_lse=False,
    )  # fmt: skip
    shapes: dict[str, Any] = {"decode_shape" if decode else "prefill_shape": shape}

    def run(q: Any, slab: Any, tables: Any, lengths: Any) -> tuple[jax.Array, jax.Array]:
        results = []
        for at in range(LAYERS):
            batch = RaggedBatch(lengths[0], tables[at % len(tables)], *lengths[1:])
            q, _ = attend(q, slab, batch, Extras(None, None, None), options, **shapes)
            results.append(q)
        return results[-1], results[0]

    return run


def padded(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    """The arguments of `program`, with the rows and the page table of an engine's step."""
    more = 0 if case.queries == 1 else max(0, case.tokens - case.tokens // 8 - case.rows)

    def wide(table: jax.Array) -> jax.Array:
        return jnp.pad(table, ((0, more), (0, MAX_PAGES - table.shape[1])))

    kv_lens, cu, *counts = inputs.lengths
    lengths = (jnp.pad(kv_lens, (0, more)), jnp.pad(cu, (0, more)), *counts)
    return inputs.q, inputs.slab, tuple(wide(t) for t in inputs.page_tables), lengths


def microseconds(compiled: Any, args: tuple[Any, ...]) -> float:
    """Of one call in the program; the median of 3 means of several runs."""
    first, *rest = args

    def run(times: int) -> float:
        nonlocal first
        begin = time.perf_counter()
        for _ in range(times):
            first, _ = compiled(first, *rest)
        jax.block_until_ready(first)
        return (time.perf_counter() - begin) / times

    run(3)  # the second captures the CUDA graph
    times = max(3, min(50, round(0.02 / run(1))))
    return 1e6 * median(run(times) for _ in range(3)) / LAYERS


def measure(kinds: list[str], seconds: float) -> Iterator[dict[str, Any]]:
    """The figures of every candidate for every case, or why there are none, until time is up."""
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for kind in kinds:
            for case in CASES[kind]:
                if time.monotonic() > deadline:
                    yield {"kind": kind, "case": case.name, "failed": "time was up"}
                    continue
                copies = max(1, min(LAYERS, (1 << 29) // case.slab_bytes(2)))
                inputs = make_inputs(case, jnp.bfloat16, copies=copies, seed=time.time_ns() % 2**32)
                args = padded(case, inputs)
                compiled = [begin_compiling(pool, case, s, args) for s in CANDIDATES[kind]]
                wait(compiled)
                for shape, future in zip(CANDIDATES[kind], compiled, strict=True):
                    yield {
                        "kind": kind, "case": case.name, **described(shape),
                        **figures(case, inputs, args, future),
                    }  # fmt: skip


def described(shape: SHAPES) -> dict[str, Any]:
    kernel = {MosaicShape: "mosaic", StreamShape: "stream"}
    return {"kernel": kernel.get(type(shape), "triton"), "shape": asdict(shape)}


def begin_compiling(
    pool: ThreadPoolExecutor, case: Case, shape: SHAPES, args: tuple[Any, ...]
) -> Future[Any]:
    """Lowers here, and compiles in the pool; what fails does so in the result."""
    try:
        lowered = jax.jit(program(case, shape)).lower(*args)
    except Exception as fault:  # others need not suffer from it
        failed: Future[Any] = Future()
        failed.set_exception(fault)
        return failed
    return pool.submit(lowered.compile)


def figures(
    case: Case, inputs: Inputs, args: tuple[Any, ...], compiled: Future[Any]
) -> dict[str, Any]:
    try:
        error = float64_error(case, inputs, compiled.result()(*args)[1])
        us = microseconds(compiled.result(), args)
    except Exception as fault:  # others need not suffer from it
        return {"failed": " ".join(f"{type(fault).__name__}: {fault}".split())[:200]}
    tflop_s, kv_gb_s = case.flops() / us / 1e6, case.kv_bytes(2) / us / 1e3
    return {"us": us, "tflop_s": tflop_s, "kv_gb_s": kv_gb_s, "error": error}


def compile_only(kinds: list[str]) -> Iterator[dict[str, Any]]:
    """Every candidate compiled for an H200, on one case each."""
    mesh = gpu_mesh()
    for kind in kinds:
        case = CASES[kind][0]
        table = jax.ShapeDtypeStruct((case.rows, MAX_PAGES), jnp.int32)
        counts = [
            jax.ShapeDtypeStruct(s, jnp.int32) for s in ((case.rows,), (case.rows + 1,), (), ())
        ]
        q = jax.ShapeDtypeStruct((case.tokens, case.heads, case.head_dim), jnp.bfloat16)
        slab = (case.pages_per_row, case.page_size, 2 * case.kv_heads, case.head_dim)
        args = (q, jax.ShapeDtypeStruct(slab, jnp.bfloat16), (table,), tuple(counts))
        args = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=mesh.everywhere), args
        )
        for shape in CANDIDATES[kind]:
            begin = time.monotonic()
            with jax.sharding.use_abstract_mesh(mesh.abstract):
                traced = jax.jit(program(case, shape)).trace(*args)
                lowered = traced.lower(lowering_platforms=mesh.lowering_platforms)
            compile_for(lowered, "gpu")
            yield {
                "kind": kind, "case": case.name, **described(shape),
                "compile_seconds": time.monotonic() - begin,
            }  # fmt: skip


def shown(figure: dict[str, Any]) -> str:
    shape = f"{figure.get('kernel', '')} " + "/".join(map(str, figure.get("shape", {}).values()))
    if "us" not in figure:
        return f"  {shape:28} {figure.get('failed') or figure.get('compile_seconds')}"
    return (
        f"  {shape:28} {figure['us']:9.1f} us {figure['tflop_s']:6.1f} TFLOP/s "
        f"{figure['kv_gb_s']:6.0f} GB/s  error {figure['error']:.1e}"
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tune_kernels", allow_abbrev=False)
    parser.add_argument("--kinds", default="prefill,decode", help="(default: prefill,decode)")
    parser.add_argument("--seconds", type=float, default=600, help="begin no case after so long")
    parser.add_argument("--out", type=Path, help="file for all figures, JSON")
    parser.add_argument("--compile-only", action="store_true")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    found: list[dict[str, Any]] = []
    last = None
    for figure in compile_only(kinds) if args.compile_only else measure(kinds, args.seconds):
        if figure["case"] != last:
            say(last := figure["case"])
        say(shown(figure))
        found.append(figure)
        if args.out is not None:
            args.out.write_text(json.dumps(found, indent=1))
    say("\nbest of each case (shapes: queries or block, ... in the order of their attributes)")
    for case in dict.fromkeys(f["case"] for f in found):
        timed = [f for f in found if f["case"] == case and "us" in f]
        if timed:
            say(f"{case}\n{shown(min(timed, key=lambda f: f['us']))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
