"""`python -P -m quire.tools.tune_products`: ways to multiply few tokens by a model's matrices.

For whoever chooses them, in model/projection.py: on a GPU, layers without attention run with XLA's
products, then with each candidate in place of one of them. What a candidate saves is the
difference, and so includes the launches it saves around it; its error against float32 stands
beside. Prints a table and writes all of it as JSON.

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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from ..model.compile import compiler_options
from ..model.decoder import RMSNorm
from ..model.kernels.gemm_gpu import GemmShape, gemm
from ..model.kernels.gemv_gpu import MAX_TOKENS, GemvShape, gemv
from ..model.projection import in_parts
from .compile_check import compile_for, gpu_mesh

LAYERS = 4
PRODUCTS = ("qkv", "out", "gate_up", "down", "logits")
Shape = GemvShape | GemmShape


@dataclass(frozen=True)
class Model:
    """Sizes of a model's matrices."""

    hidden: int
    qkv: int
    q: int
    inner: int
    vocab: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each product; of `gate_up` both halves."""
        return {
            "qkv": (self.qkv, self.hidden),
            "out": (self.hidden, self.q),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "logits": (self.vocab, self.hidden),
        }


MODELS = {
    "llama-3.1-8b": Model(4096, 6144, 4096, 14336, 128256),
    "qwen2.5-1.5b": Model(1536, 2048, 1536, 8960, 151936),
}

_GEMV, _GEMM = GemvShape(), GemmShape()
CANDIDATES: dict[bool, list[Shape]] = {
    True: [
        _GEMV, replace(_GEMV, unroll=4), replace(_GEMV, unroll=16),
        replace(_GEMV, rows=2, num_warps=2), replace(_GEMV, rows=8, num_warps=8),
        replace(_GEMV, rows=8), replace(_GEMV, rows=2, block=512),
        replace(_GEMV, rows=1, block=1024),
    ],
    False: [
        _GEMM, replace(_GEMM, rows=32), replace(_GEMM, rows=16), replace(_GEMM, rows=128),
        replace(_GEMM, rows=32, num_stages=6), replace(_GEMM, rows=16, block=256),
        replace(_GEMM, rows=32, programs=264), replace(_GEMM, rows=64, programs=264),
        replace(_GEMM, rows=64, block=64, num_stages=6), replace(_GEMM, rows=16, programs=528),
        replace(_GEMM, rows=32, num_warps=8), replace(_GEMM, rows=64, num_warps=8),
    ],
}  # fmt: skip


class Mixed:
    """A `Project` that takes a candidate for one product, and XLA for the others."""

    def __init__(self, chosen: str, shape: Shape | None):
        self._chosen, self._shape = chosen, shape

    def __call__(self, name: str, x: jax.Array, matrix: Any, **given: Any) -> jax.Array:
        if self._shape is None or name != self._chosen:
            return in_parts(x, matrix, **given)
        norm = given.pop("norm", None)
        given |= {"scale": norm and norm.scale[...], "eps": norm.eps if norm else 0.0}
        given |= {"bias": matrix.bias, "shape": self._shape}
        multiply = gemv if isinstance(self._shape, GemvShape) else gemm
        return multiply(x, matrix.weight, **given)


def norm_of(scale: jax.Array) -> Any:
    itself: Any = SimpleNamespace(scale=scale, eps=1e-5)
    norm: Any = partial(RMSNorm.__call__, itself)
    norm.scale, norm.eps = itself.scale, itself.eps
    return norm


def layers(project: Mixed, model: Model, x: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
    """(hidden states, logits) after LAYERS layers whose attention gives the queries back."""

    def matrix(weight: jax.Array) -> Any:
        return SimpleNamespace(weight=weight, bias=None, summed=False)

    for layer in weights["layers"]:
        norm = norm_of(layer["norm"])
        q = project("qkv", x, matrix(layer["qkv"]), norm=norm)[:, : model.q]
        x = project("out", q, matrix(layer["out"]), residual=x)
        inner = project("gate_up", x, matrix(layer["gate_up"]), norm=norm, gated=True)
        x = project("down", inner, matrix(layer["down"]), residual=x)
    norm = norm_of(weights["layers"][0]["norm"])
    return x, project("logits", x, matrix(weights["logits"]), norm=norm, out_dtype=jnp.float32)


def abstract(model: Model, dtype: Any, sharding: Any = None) -> Any:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    sizes = model.matrices()
    layer = {name: array(*sizes[name]) for name in PRODUCTS[:-1]} | {"norm": array(model.hidden)}
    return {"layers": [dict(layer) for _ in range(LAYERS)], "logits": array(*sizes["logits"])}


def make_weights(model: Model) -> Any:
    shapes, tree = jax.tree.flatten(abstract(model, jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(shapes))

    def draw(key: jax.Array, of: jax.ShapeDtypeStruct) -> jax.Array:
        return (jax.random.normal(key, of.shape, jnp.bfloat16) / of.shape[-1] ** 0.5).astype(
            of.dtype
        )

    made = [jax.jit(draw, static_argnums=1)(k, s) for k, s in zip(keys, shapes, strict=True)]
    return jax.tree.unflatten(tree, made)


def program(model: Model, chosen: str, shape: Shape | None) -> Callable[..., Any]:
    def run(x: jax.Array, weights: Any) -> tuple[jax.Array, ...]:
        return layers(Mixed(chosen, shape), model, x, weights)

    return run


def choices(tokens: int) -> list[tuple[str, Shape | None]]:
    """XLA's, then every candidate for every product."""
    few = CANDIDATES[tokens <= MAX_TOKENS]
    return [("", None), *((name, shape) for name in PRODUCTS for shape in few)]


def microseconds(compiled: Any, x: jax.Array, weights: Any) -> float:
    """Of one run; the median of 5 means of several runs."""

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            out = compiled(x, weights)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / times

    run(3)  # the second captures the CUDA graph
    times = max(5, min(50, round(0.01 / run(2))))
    return 1e6 * median(run(times) for _ in range(5))


def begin_compiling(
    pool: ThreadPoolExecutor, run: Callable[..., Any], x: jax.Array, weights: Any
) -> Future[Any]:
    """Lowers here, and compiles in the pool as an engine does; what fails does so in the result."""
    try:
        lowered = jax.jit(run).lower(x, weights)
    except Exception as fault:  # others need not suffer from it
        failed: Future[Any] = Future()
        failed.set_exception(fault)
        return failed
    options = compiler_options(jax.default_backend(), len(x))
    return pool.submit(lowered.compile, compiler_options=options)


def measure(model_name: str, tokens: int, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    model = MODELS[model_name]
    weights = make_weights(model)
    x = jax.random.normal(jax.random.key(1), (tokens, model.hidden), jnp.bfloat16)
    wanted = choices(tokens)
    compiled = [begin_compiling(pool, program(model, *choice), x, weights) for choice in wanted]
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), weights)
        exact = jax.jit(program(model, "", None))(x.astype(jnp.float32), wide)
    wait(compiled)  # XLA times its own candidates on the device while it compiles
    base = 0.0
    for (product, shape), future in zip(wanted, compiled, strict=True):
        said = {"model": model_name, "tokens": tokens, "product": product}
        said |= {"shape": shape and {"kind": type(shape).__name__, **asdict(shape)}}
        try:
            got = future.result()(x, weights)
            errors = [
                float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
                for a, b in zip(got, exact, strict=True)
            ]
            us = microseconds(future.result(), x, weights)
        except Exception as fault:  # others need not suffer from it
            yield said | {"failed": " ".join(f"{type(fault).__name__}: {fault}".split())[:200]}
            continue
        base = us if shape is None else base
        each = (base - us) / (1 if product == "logits" else LAYERS)
        yield said | {"us": us, "saved_us_each": each, "errors": errors}


def compile_only(model_name: str, tokens: int) -> Iterator[dict[str, Any]]:
    mesh, model = gpu_mesh(), MODELS[model_name]
    weights = abstract(model, jnp.bfloat16, mesh.everywhere)
    x = jax.ShapeDtypeStruct((tokens, model.hidden), jnp.bfloat16, sharding=mesh.everywhere)
    for product, shape in choices(tokens):
        begin = time.monotonic()
        with jax.sharding.use_abstract_mesh(mesh.abstract):
            traced = jax.jit(program(model, product, shape)).trace(x, weights)
            lowered = traced.lower(lowering_platforms=mesh.lowering_platforms)
        compile_for(lowered, "gpu", tokens)
        yield {
            "model": model_name, "tokens": tokens, "product": product,
            "shape": shape and asdict(shape), "compile_seconds": time.monotonic() - begin,
        }  # fmt: skip


def shown(figure: dict[str, Any]) -> str:
    shape = "/".join(map(str, (figure["shape"] or {"": "XLA"}).values()))
    if "us" not in figure:
        return f"  {figure['product']:8} {shape:32} {figure.get('failed', 'compiled')}"
    errors = " ".join(f"{e:.1e}" for e in figure["errors"])
    saved = figure["saved_us_each"]
    return (
        f"  {figure['product']:8} {shape:32} {figure['us']:8.1f} us  saves {saved:6.1f}  {errors}"
    )


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tune_products", allow_abbrev=False)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default="1,8,16,32,64")
    parser.add_argument("--seconds", type=float, default=600, help="begin no case after so long")
    parser.add_argument("--out", type=Path, help="file for all figures, JSON")
    parser.add_argument("--compile-only", action="store_true")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tokens in map(int, args.tokens.split(",")):
            for name in args.models.split(","):
                if time.monotonic() > deadline:
                    say(f"{name}, {tokens} tokens: time was up")
                    continue
                figures = (
                    compile_only(name, tokens) if args.compile_only else measure(name, tokens, pool)
                )
                say(f"{name}, {tokens} tokens (shapes in the order of their attributes)")
                for figure in figures:
                    say(shown(figure))
                    found.append(figure)
                    if args.out is not None:
                        args.out.write_text(json.dumps(found, indent=1))
                for product in PRODUCTS:
                    timed = [
                        f for f in found
                        if (f["model"], f["tokens"], f["product"]) == (name, tokens, product)
                        and "us" in f
                    ]  # fmt: skip
                    if timed:
                        say(f"best:\n{shown(max(timed, key=lambda f: f['saved_us_each']))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
