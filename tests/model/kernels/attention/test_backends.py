"""Every attention backend against one NumPy float64 statement, over random ragged batches.

A backend joins by standing in api.BACKENDS; those of another platform are left out, and on an
accelerator the ones that interpret a kernel. The cases cover every pair of option values; each is
drawn with NaN wherever no token may look, so a result that is finite has not looked there.
Interpreted TPU and Mosaic kernels are dear to compile, so they get fewer cases, of the values they
treat apart. The largest error of each backend and dtype is printed at the end (`-s` shows it).
"""

from __future__ import annotations

import itertools
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from quire.model.kernels.attention import gpu, gpu_mosaic
from quire.model.kernels.attention.api import BACKENDS, ragged_paged_attention
from quire.model.kernels.attention.contract import Extras, Options

PLATFORM = jax.default_backend()


def is_here(name: str) -> bool:
    platform = name.split("_")[0]
    if name == "gpu_triton":
        return False  # that is "gpu", in steps of as few tokens as here
    if name.endswith("_interpret"):
        # Before 0.11 Mosaic's cannot serve, and Triton's would be tested twice.
        return PLATFORM == "cpu" and ("mosaic" not in name or jax.__version_info__ >= (0, 11))
    return platform in ("reference", "blockwise", PLATFORM)


HERE = [name for name in BACKENDS if is_here(name)]
MOSAIC = [name for name in HERE if "mosaic" in name]
GENERAL = [name for name in HERE if name not in MOSAIC]  # serve every option by themselves

# Largest error, absolute (for values of about 1, as drawn) and relative. float32 is the sum of
# rounding along 2,000 positions. The others are twice one rounding: the output's, and that of the
# weights, which kernels give to a matrix unit in the narrow type; all sums are float32.
BOUNDS = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10}
LSE_BOUND = 1e-5

errors: dict[tuple[str, str], list[float]] = defaultdict(list)


@pytest.fixture(scope="module", autouse=True)
def print_errors() -> Iterator[None]:
    yield
    for (backend, dtype), seen in sorted(errors.items()):
        said = f"\n{backend} {dtype}: largest error {max(seen):.2e}, bound {BOUNDS[dtype]:.2e}\n"
        sys.stderr.write(said)  # which xdist's workers share with who started them


FACTORS: dict[str, tuple[Any, ...]] = {
    "head_dim": (64, 80, 128, 256),
    "group": (1, 4, 7, 8),
    "window": (None, 1, 17, 512),
    "page_size": (16, 32, 64, 128),
    "mode": ("decode", "prefill", "mixed"),
    "lengths": ("short", "long", "edge"),
    "dtype": ("float32", "bfloat16", "float16"),
    "kv_scales": (None, "scalar", "per head"),
    "cached": (True, False),  # prompt rows continue a cached prefix
    "soft_cap": (None, 3.0),
    "sinks": (False, True),
    "return_lse": (False, True),
}
Case = dict[str, Any]


def pairwise_cover(factors: dict[str, tuple[Any, ...]]) -> list[Case]:
    """Few cases such that any two values of any two factors meet in one of them. Greedy."""
    names = list(factors)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    cases = []
    while missing:
        chosen = dict(min(missing))  # the first pair not yet met, then what meets most others
        for name in names:
            if name not in chosen:
                gains = [
                    sum(
                        tuple(sorted([(name, x), other], key=lambda p: names.index(p[0])))
                        in missing
                        for other in chosen.items()
                    )
                    for x in range(len(factors[name]))
                ]
                turn = len(cases)  # ties go round, so that no value is always the one that loses
                order = [(turn + i) % len(gains) for i in range(len(gains))]
                chosen[name] = max(order, key=lambda x: gains[x])
        missing -= set(itertools.combinations(((n, chosen[n]) for n in names), 2))
        cases.append({n: factors[n][chosen[n]] for n in names})
    return cases


CASES = pairwise_cover(FACTORS)

# On TPU a slab's head dim is a multiple of 128.
TPU_FACTORS = FACTORS | {
    "head_dim": (128, 256),
    "group": (1, 4, 7),
    "window": (None, 17),
    "page_size": (16, 128),
    "dtype": ("float32", "bfloat16"),
}
# What Mosaic's kernel for prompt rows serves; interpreted, a few of them.
MOSAIC_FACTORS = FACTORS | {
    "head_dim": (64, 128),
    "mode": ("prefill", "mixed"),
    "dtype": ("bfloat16", "float16"),
    "kv_scales": (None,),
    "soft_cap": (None,),
    "sinks": (False,),
    "return_lse": (False,),
}
# Where decode rows are cut.
MERGE_FACTORS = FACTORS | {"mode": ("decode", "mixed"), "lengths": ("long",)}
# Where rows lie in several shares of a stream, or several in one.
STREAM_FACTORS = FACTORS | {
    "mode": ("decode", "mixed"), "lengths": ("long", "short", "edge"), "window": (None, 512)
}  # fmt: skip
CASES_OF = {
    "tpu_interpret": pairwise_cover(TPU_FACTORS),
    "gpu_mosaic": pairwise_cover(MOSAIC_FACTORS),
    "gpu_merge_inside": pairwise_cover(MERGE_FACTORS),
    "gpu_merge_inside_interpret": pairwise_cover(MERGE_FACTORS)[:4],
    "gpu_stream_interpret": pairwise_cover(STREAM_FACTORS)[:10],
    "gpu_mosaic_interpret": [
        {**dict.fromkeys(("kv_scales", "soft_cap")), "sinks": False, "return_lse": False}
        | dict(zip(list(FACTORS)[:7], values[:7], strict=True)) | {"cached": values[7]}
        for values in (
            (128, 4, None, 16, "mixed", "short", "bfloat16", True),
            (64, 7, 17, 32, "prefill", "edge", "float16", True),
            (128, 1, None, 128, "prefill", "edge", "bfloat16", False),
        )
    ],
}  # fmt: skip


class Batch(NamedTuple):
    """Arguments of ragged_paged_attention, as NumPy arrays."""

    q: np.ndarray
    slab: np.ndarray
    kv_lens: np.ndarray
    page_table: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.int32
    num_decode: np.int32


@dataclass
class Problem:
    batch: Batch
    options: dict[str, Any]


FIRST_PAGE = 5  # as if the layer were not the slab's first


def draw_lengths(case: Case, rng: np.random.Generator) -> tuple[list[int], list[int], int]:
    """(q_len and kv_len of each row, how many of them are decode rows)."""
    page = case["page_size"]

    def kv(q_len: int) -> int:
        if case["lengths"] == "short":
            return q_len + int(rng.integers(0, 40))
        if case["lengths"] == "long":
            return int(rng.integers(max(q_len, 400), 2001))
        return max(q_len, page * int(rng.integers(1, 5)) + int(rng.integers(-1, 2)))

    decode = {"decode": 5, "prefill": 0, "mixed": 3}[case["mode"]]
    q_lens = [1] * decode
    if case["mode"] != "decode":
        # One tile and a bit, a single token, one whole tile, and what is left.
        q_lens += [int(x) for x in rng.permutation([70, 1, 64, int(rng.integers(2, 19))])]
    kv_lens = [
        kv(q_len) if i < decode or case["cached"] else q_len for i, q_len in enumerate(q_lens)
    ]
    if case["lengths"] == "long":
        kv_lens[0] = max(q_lens[0], 2000) if decode or case["cached"] else q_lens[0]
    if case["lengths"] == "edge":
        if decode:
            kv_lens[1] = 0  # a decode row that has nothing
            kv_lens[0] = 1
        if case["mode"] != "decode":
            q_lens[-2] = 0  # a prompt row without queries
    return q_lens, kv_lens, decode


def make_problem(case: Case, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    q_lens, kv_lens, num_decode = draw_lengths(case, rng)
    decode_only = case["mode"] == "decode"
    num_rows, num_tokens = (7, 7) if decode_only else (8, 176)
    page, head_dim, window = case["page_size"], case["head_dim"], case["window"]
    kv_heads = 1 if head_dim == 256 else 2
    heads = kv_heads * case["group"]
    max_pages = -(-max(kv_lens) // page) + 1

    # Rows that do not exist hold nonsense; so do the tokens after the last row.
    kv_table = np.full(num_rows, 9, np.int32)
    kv_table[: len(kv_lens)] = kv_lens
    cu = np.full(num_rows + 1, -3, np.int32)
    cu[: len(q_lens) + 1] = np.cumsum([0, *q_lens])
    q = rng.standard_normal((num_tokens, heads, head_dim)).astype(np.float32)
    q[sum(q_lens) :] = np.nan
    q = q.astype(jnp.dtype(case["dtype"]))

    pages_needed = sum(-(-n // page) for n in kv_lens)
    free = iter(rng.permutation(np.arange(1, pages_needed + 1)))
    num_pages = FIRST_PAGE + pages_needed + 1
    slab = np.full((num_pages, page, 2 * kv_heads, head_dim), np.nan, np.float32)
    table = np.zeros((num_rows, max_pages), np.int32)
    for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        oldest = 0 if window is None else max(0, kv_len - max(q_len, 1) - window + 1)
        for p in range(-(-kv_len // page)):
            if (p + 1) * page <= oldest:
                continue  # wholly behind the window: the page was freed, its entry is 0
            table[row, p] = next(free)
            low, high = max(oldest, p * page), min(kv_len, (p + 1) * page)
            slab[FIRST_PAGE + table[row, p], low - p * page : high - p * page] = (
                rng.standard_normal((high - low, 2 * kv_heads, head_dim))
            )
    quantized = case["kv_scales"] == "scalar"
    slab = slab.astype(ml_dtypes.float8_e4m3fn if quantized else jnp.dtype(case["dtype"]))

    scales: Any = None
    if case["kv_scales"] == "scalar":
        scales = (1.5, 0.7)
    elif case["kv_scales"] == "per head":
        scales = tuple(rng.uniform(0.5, 2, kv_heads).astype(np.float32) for _ in "kv")
    options = {
        "scale": head_dim**-0.5,
        "first_page": FIRST_PAGE,
        "window": window,
        "soft_cap": case["soft_cap"],
        "sinks": rng.standard_normal(heads).astype(np.float32) if case["sinks"] else None,
        "kv_scales": scales,
    }
    counts = np.int32(len(q_lens)), np.int32(num_decode)
    return Problem(Batch(q, slab, kv_table, table, cu, *counts), options)


def numpy_attention(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The definition, row by row and head by head, in float64: (o [T, H, D], lse [T, H])."""
    b, opt = problem.batch, problem.options
    num_tokens, heads, head_dim = b.q.shape
    kv_heads = b.slab.shape[2] // 2
    k_scale, v_scale = (1.0, 1.0) if opt["kv_scales"] is None else opt["kv_scales"]
    k_scale, v_scale = (np.broadcast_to(np.float64(s), kv_heads) for s in (k_scale, v_scale))
    out = np.zeros((num_tokens, heads, head_dim))
    lse = np.full((num_tokens, heads), -np.inf)
    for row in range(b.num_seqs):
        begin, end = b.cu_q_lens[row], b.cu_q_lens[row + 1]
        cached = b.slab[opt["first_page"] + b.page_table[row]]
        cached = cached.reshape(-1, 2 * kv_heads, head_dim).astype(np.float64)
        position = (b.kv_lens[row] - (end - begin) + np.arange(end - begin))[:, None]
        seen = np.arange(len(cached)) <= position  # [queries, positions]
        if opt["window"] is not None:
            seen &= np.arange(len(cached)) > position - opt["window"]
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            k = cached[:, 2 * kv_head] * k_scale[kv_head]
            # A weight of 0 must be able to drop NaN; a NaN that is seen shows in its logit.
            v = np.nan_to_num(cached[:, 2 * kv_head + 1] * v_scale[kv_head])
            logits = opt["scale"] * (b.q[begin:end, head].astype(np.float64) @ k.T)
            if opt["soft_cap"] is not None:
                logits = opt["soft_cap"] * np.tanh(logits / opt["soft_cap"])
            logits = np.where(seen, logits, -np.inf)
            sink = -np.inf if opt["sinks"] is None else opt["sinks"][head]
            top = np.maximum(logits.max(axis=1, initial=sink), -1e30)[:, None]
            weights = np.exp(logits - top)
            total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
            out[begin:end, head] = weights @ v / np.where(total > 0, total, 1)
            with np.errstate(divide="ignore"):
                lse[begin:end, head] = (top + np.log(total))[:, 0]
    return out, lse


def compiler_options(backend: str) -> dict[str, Any] | None:
    """An interpreted kernel takes long to compile and no time to run."""
    triton = backend in ("gpu_interpret", "gpu_merge_inside_interpret", "gpu_stream_interpret")
    return {"xla_backend_optimization_level": 0} if triton else None


def program(backend: str, problem: Problem, **kwargs: Any) -> Any:
    """The jitted operation on any batch of the problem's shapes and options."""
    return jax.jit(
        lambda *args: ragged_paged_attention(*args, backend=backend, **problem.options, **kwargs),
        compiler_options=compiler_options(backend),
    )


def run(backend: str, problem: Problem, **kwargs: Any) -> tuple[np.ndarray, np.ndarray | None]:
    got = program(backend, problem, **kwargs)(*problem.batch)
    out, lse = got if kwargs.get("return_lse") else (got, None)
    assert out.dtype == problem.batch.q.dtype
    return np.asarray(out, np.float64), None if lse is None else np.asarray(lse)


def check(backend: str, problem: Problem, *, decode_only: bool, return_lse: bool = True) -> None:
    out, lse = run(backend, problem, decode_only=decode_only, return_lse=return_lse)
    want, want_lse = numpy_attention(problem)
    bound = BOUNDS[str(problem.batch.q.dtype)]
    scales = problem.options["kv_scales"]
    values = 1.0 if scales is None else max(1.0, float(np.max(scales[1])))
    # As a part of what is allowed beside a value of this size.
    errors[backend, str(problem.batch.q.dtype)].append(
        float(np.max(np.abs(out - want) / (values + np.abs(want)), initial=0))
    )
    np.testing.assert_allclose(out, want, atol=bound * values, rtol=bound)
    if return_lse:
        assert lse is not None and lse.dtype == np.float32
        np.testing.assert_allclose(lse, want_lse, atol=LSE_BOUND, rtol=LSE_BOUND)


def name_of(case: Case) -> str:
    return "-".join(str(v) for v in case.values())


@pytest.mark.parametrize(
    ("backend", "case"),
    [(b, case) for b in HERE for case in CASES_OF.get(b, CASES)],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_covered_options(backend: str, case: Case) -> None:
    problem = make_problem(case, seed=CASES_OF.get(backend, CASES).index(case))
    check(backend, problem, decode_only=case["mode"] == "decode", return_lse=case["return_lse"])


def test_cases_meet_every_pair_of_values() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(case[a], case[b]) for case in CASES}
        assert met == set(itertools.product(FACTORS[a], FACTORS[b]))
    assert len(CASES) < 30


PLAIN: Case = {
    "head_dim": 64,
    "group": 4,
    "window": None,
    "page_size": 16,
    "mode": "mixed",
    "lengths": "short",
    "dtype": "float32",
    "kv_scales": None,
    "cached": True,
    "soft_cap": None,
    "sinks": True,
    "return_lse": True,
}


# On a GPU also what large steps of a narrow type take.
@pytest.mark.parametrize("dtype", ["float32", *["bfloat16"] * (PLATFORM == "gpu")])
@pytest.mark.parametrize("backend", GENERAL)
def test_a_prompt_of_2000_tokens(backend: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    n, page = 2000, 32
    num_pages = -(-n // page)
    slab = np.full((num_pages + 1, page, 2, 64), np.nan, np.float32)
    table = 1 + rng.permutation(num_pages).astype(np.int32)
    tokens = rng.standard_normal((n, 2, 64)).astype(np.float32)
    for p in range(num_pages):
        chunk = tokens[p * page : (p + 1) * page]
        slab[table[p], : len(chunk)] = chunk
    q = rng.standard_normal((2048, 2, 64)).astype(np.float32)
    lens = np.array([n], np.int32)
    cu = np.array([0, n], np.int32)
    q, slab = (x.astype(jnp.dtype(dtype)) for x in (q, slab))
    batch = Batch(q, slab, lens, table[None], cu, np.int32(1), np.int32(0))
    options = dict.fromkeys(("window", "soft_cap", "sinks", "kv_scales"), None)
    problem = Problem(batch, {"scale": 0.125, "first_page": 0, **options})
    check(backend, problem, decode_only=False, return_lse=dtype == "float32")


@pytest.mark.parametrize("backend", [name for name in GENERAL if name.startswith("gpu")])
def test_pages_far_smaller_than_a_block(backend: str) -> None:
    """On GPUs their ids are read as one array."""
    check(backend, make_problem(PLAIN | {"page_size": 2}, seed=7), decode_only=False)


@pytest.mark.parametrize("backend", [name for name in GENERAL if name.startswith("gpu")])
def test_hundreds_of_short_prompts(backend: str) -> None:
    """There are more items than programs, some of them parts of tiles over a long cache."""
    rng, rows = np.random.default_rng(11), 240
    q_lens, cached = rng.integers(1, 3, rows), rng.integers(0, 20, rows)
    cached[[3, 100, rows - 3]] = 1500
    kv_lens = (q_lens + cached).astype(np.int32)
    pages = -(-kv_lens // 16)
    table = np.zeros((rows, 96), np.int32)
    table[np.arange(96) < pages[:, None]] = 1 + rng.permutation(pages.sum())
    q = rng.standard_normal((400, 4, 64)).astype(np.float32)
    slab = rng.standard_normal((1 + pages.sum(), 16, 4, 64)).astype(np.float32)
    cu = np.cumsum([0, *q_lens]).astype(np.int32)
    batch = Batch(q, slab, kv_lens, table, cu, np.int32(rows - 2), np.int32(0))
    options = dict.fromkeys(("window", "soft_cap", "sinks", "kv_scales"), None)
    problem = Problem(batch, {"scale": 0.125, "first_page": 0, **options})
    check(backend, problem, decode_only=False)


@pytest.mark.parametrize("backend", GENERAL)
def test_one_program_serves_every_batch_of_its_shape(backend: str) -> None:
    """Lengths, counts and tables are data: nothing recompiles, and degenerate batches are legal."""
    problem = make_problem(PLAIN | {"lengths": "edge"}, seed=3)
    compiled = program(backend, problem, return_lse=True).lower(*problem.batch).compile()
    b = problem.batch
    q_lens = np.diff(b.cu_q_lens)[: b.num_seqs]
    variants = {
        "as drawn": b,
        "no rows": b._replace(num_seqs=np.int32(0), num_decode=np.int32(0)),
        "decode rows only": b._replace(num_seqs=b.num_decode),
        "decode rows as prompts": b._replace(num_decode=np.int32(0)),
        "all caches empty": b._replace(kv_lens=np.zeros_like(b.kv_lens)),
        "more queries than cache": b._replace(
            kv_lens=np.minimum(b.kv_lens, max(q_lens) - 5).astype(np.int32)
        ),
    }
    bound = BOUNDS["float32"]
    for name, batch in variants.items():
        out, lse = compiled(*batch)
        want, want_lse = numpy_attention(Problem(batch, problem.options))
        np.testing.assert_allclose(out, want, atol=bound, rtol=bound, err_msg=name)
        np.testing.assert_allclose(lse, want_lse, atol=bound, rtol=bound, err_msg=name)
        assert not np.any(out[batch.cu_q_lens[batch.num_seqs] :]), name


@pytest.mark.parametrize("backend", GENERAL)
def test_decode_only_program_gives_what_the_mixed_one_gives(backend: str) -> None:
    problem = make_problem(PLAIN | {"mode": "decode", "lengths": "long"}, seed=4)
    out, _ = run(backend, problem, decode_only=True)
    mixed, _ = run(backend, problem, decode_only=False)
    np.testing.assert_allclose(out, mixed, atol=1e-6, rtol=1e-6)


def test_more_rows_than_tokens_is_legal() -> None:
    problem = make_problem(PLAIN | {"mode": "decode"}, seed=5)
    b = problem.batch
    n = 5
    short = Problem(b._replace(q=b.q[:n]), problem.options)
    for backend in GENERAL:
        check(backend, short, decode_only=False)


@pytest.mark.parametrize("mode", ["decode", "mixed"])
@pytest.mark.parametrize("backend", [*GENERAL, *(b for b in MOSAIC if b == "gpu_mosaic")])
def test_a_row_whose_cache_is_not_finite_keeps_it_to_itself(backend: str, mode: str) -> None:
    plain = MOSAIC_PLAIN if backend in MOSAIC else PLAIN
    problem = make_problem(plain | {"mode": mode}, seed=6)
    batch = problem.batch
    attend = program(backend, problem, decode_only=mode == "decode")
    clean = np.asarray(attend(*batch))
    for sick in range(int(batch.num_seqs)):
        slab = batch.slab.copy()
        used = -(-batch.kv_lens[sick] // plain["page_size"])
        slab[FIRST_PAGE + batch.page_table[sick, :used]] = np.nan
        out = np.asarray(attend(*batch._replace(slab=slab)))
        mine = slice(batch.cu_q_lens[sick], batch.cu_q_lens[sick + 1])
        assert np.isnan(out[mine]).any()
        np.testing.assert_array_equal(np.delete(out, mine, 0), np.delete(clean, mine, 0))


# A group of 6 is three sets of heads, each with tiles of its own.
MOSAIC_PLAIN = PLAIN | {
    "dtype": "bfloat16", "sinks": False, "page_size": 16, "return_lse": False, "group": 6
}  # fmt: skip


@pytest.mark.parametrize("backend", [name for name in BACKENDS if "mosaic" in name])
def test_cases_of_mosaic_are_what_it_serves(backend: str) -> None:
    """Or Triton's kernel would be tested in its place."""
    for case in [*CASES_OF[backend], MOSAIC_PLAIN]:
        problem = make_problem(case, seed=0)
        options = Options(
            1.0, 0, case["window"], case["soft_cap"], decode_only=False, return_lse=False
        )
        extras = Extras(None, None, None)
        shape, reason = gpu_mosaic.MosaicShape(), None
        if jax.__version_info__ >= (0, 11):
            reason = gpu_mosaic.why_not(problem.batch.q, problem.batch.slab, extras, options, shape)
        assert reason is None, case


@pytest.mark.parametrize("backend", MOSAIC)
def test_mosaic_merges_parts_and_takes_degenerate_batches(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = gpu_mosaic.MosaicShape(block=64, num_stages=2, least_blocks=1)
    monkeypatch.setattr(gpu, "_mosaic_shape", lambda: shape)
    problem = make_problem(MOSAIC_PLAIN | {"lengths": "edge", "page_size": 64}, seed=8)
    b = problem.batch
    compiled = program(backend, problem).lower(*b).compile()
    bound = BOUNDS["bfloat16"]
    for batch in (
        b,
        b._replace(num_seqs=b.num_decode),
        b._replace(kv_lens=np.minimum(b.kv_lens, 20).astype(np.int32)),
    ):
        out = np.asarray(compiled(*batch), np.float64)
        want, _ = numpy_attention(Problem(batch, problem.options))
        np.testing.assert_allclose(out, want, atol=bound, rtol=bound)
