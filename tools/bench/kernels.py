"""`quire bench kernels`: attention and KV write alone, beside what the device can do at best.

Every attention backend that is for this platform runs every case of a grid: many calls inside one
jitted loop, each fed the last one's output, taking turns over copies of the K and V that together
outgrow the caches. The limits are measured on the spot (device_limits.py). Beside each time stands
the error of a single call with fresh inputs against float64.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from ..flags import names, positive
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    from ...serving.progress import Reporter
    from .device_limits import Limits
    from .kernel_cases import Case, Inputs

OUTGROW = 256 << 20
"""Bytes that copies of K and V together have at least, on an accelerator."""

MAX_COPIES = 8
LOOP = 4  # turns over all copies in one call of the jitted loop
WRITE_PLACES = 4  # sets of positions that writes take turns over
LOOK_SECONDS = 0.03  # between two looks at the clock
ORACLE_WORK = 100_000
"""Tokens times context up to which the reference, whose cost that is, is worth timing."""

WRITE_TOKENS = (1, 8, 64, 256, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--grid",
        metavar="FILE",
        help="small, full, or a JSON list of cases (default: small on CPU, else full)",
    )
    group.add_argument(
        "--backends",
        type=names,
        metavar="NAMES",
        help="attention backends (default: all that are for this platform)",
    )
    group.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="(default: float32 on CPU, else bfloat16)",
    )
    group.add_argument(
        "--seconds",
        type=positive,
        default=3600,
        metavar="N",
        help="begin no case after this long; what is left out is said (default: 3600)",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    import jax

    from ...model.memory import PLATFORMS
    from ...serving.progress import Terminal
    from .device_limits import measure_limits
    from .kernel_cases import read_grid

    # As model/mesh.py names platforms.
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
    grid = args.grid or ("small" if platform == "cpu" else "full")
    cases = read_grid(grid, PLATFORMS[platform].page_size)
    backends = _backends(args.backends, platform)
    dtype = args.dtype or ("float32" if platform == "cpu" else "bfloat16")
    reporter = Terminal()
    with reporter.phase("limits"):
        limits = measure_limits(platform, dtype)
    bench = _Kernels(platform, dtype, limits, time.monotonic() + args.seconds)
    results = {
        "dtype": dtype,
        "limits": {"copy_gb_s": limits.copy_gb_s, "matmul_tflop_s": limits.matmul_tflop_s},
        "attention": bench.attention(cases, backends, reporter),
        "kv_write": bench.writes(cases, reporter),
        "left_out": bench.left_out,
    }
    finish(args, results, _tables(results), lambda figure: _draw(figure, results))


def _backends(wanted: tuple[str, ...] | None, platform: str) -> tuple[str, ...]:
    """Those asked for, or all but those that are named after another platform."""
    from ...errors import InvalidConfig
    from ...model.kernels.attention.api import BACKENDS

    for name in wanted or ():
        if name not in BACKENDS:
            raise InvalidConfig(f"backends: got {name!r}, must be among {', '.join(BACKENDS)}")
    others = {"cpu", "gpu", "tpu"} - {platform}
    mine = (n for n in BACKENDS if n.split("_")[0] not in others)
    special = ("_interpret", "_triton", "_mosaic", "_inside", "_stream")  # tests, parts of "gpu"
    return wanted or tuple(n for n in mine if not n.endswith(special))


class _Kernels:
    """Measures, and keeps account of what it leaves out."""

    def __init__(self, platform: str, dtype: str, limits: Limits, deadline: float):
        import jax.numpy as jnp

        self._platform, self._limits, self._deadline = platform, limits, deadline
        self._dtype = jnp.dtype(dtype)
        self.left_out: list[str] = []

    def attention(
        self, cases: list[Case], backends: tuple[str, ...], reporter: Reporter
    ) -> list[dict[str, Any]]:
        from .kernel_cases import as_json, make_inputs

        rows = []
        with reporter.phase("attention") as update, ThreadPoolExecutor(2 * len(backends)) as pool:
            for at, case in enumerate(cases):
                update(at, len(cases))
                chosen = [name for name in backends if not self._leaves_out(case, name)]
                if not chosen:
                    continue
                inputs = make_inputs(case, self._dtype, copies=self._copies(case))
                # All of a case are compiled together, and timed one by one when that is over.
                started = {name: _compile(pool, case, inputs, name) for name in chosen}
                wait([future for futures in started.values() for future in futures])
                for name, futures in started.items():
                    figures = self._one(case, inputs, *futures)
                    rows.append({**as_json(case), "backend": name, **figures})
        return rows

    def _leaves_out(self, case: Case, backend: str) -> bool:
        why = ""
        if time.monotonic() > self._deadline:
            why = "time was up"
        elif backend == "reference" and case.tokens * case.context > ORACLE_WORK:
            why = "the reference would take too long"
        if why:
            self.left_out.append(f"{backend}: {case.name}: {why}")
        return bool(why)

    def _copies(self, case: Case) -> int:
        if self._platform == "cpu":
            return 2
        return min(MAX_COPIES, -(-OUTGROW // case.slab_bytes(self._dtype.itemsize)))

    def _one(
        self, case: Case, inputs: Inputs, single: Future[Any], loop: Future[Any]
    ) -> dict[str, Any]:
        """Microseconds, rates and error; or what went wrong, which others need not suffer from."""
        from .kernel_cases import float64_error

        try:
            q, slab, tables, lengths = inputs.q, inputs.slab, inputs.page_tables, inputs.lengths
            out = single.result()(q, slab, tables[0], lengths)
            error = float64_error(case, inputs, out)
            seconds = _timed(loop.result(), q, slab, tables, lengths) / (LOOP * len(tables))
        except Exception as fault:
            text = " ".join(str(fault).split())[:300]
            return {"failed": f"{type(fault).__name__}: {text}"}
        moved, flops = case.moved_bytes(self._dtype.itemsize), case.flops()
        return {
            "us": 1e6 * seconds,
            "kv_gb_s": case.kv_bytes(self._dtype.itemsize) / seconds / 1e9,
            "tflop_s": flops / seconds / 1e12,
            "share_of_limit": self._limits.floor_seconds(moved, flops) / seconds,
            "error": error,
        }

    def writes(self, cases: list[Case], reporter: Reporter) -> list[dict[str, Any]]:
        """write_kv for each shape of a token in the grid, over several token counts."""
        shapes = dict.fromkeys((c.kv_heads, c.head_dim, c.page_size) for c in cases)
        todo = [(*shape, tokens) for shape in shapes for tokens in WRITE_TOKENS]
        rows = []
        with reporter.phase("KV write") as update:
            for at, (kv_heads, head_dim, page_size, tokens) in enumerate(todo):
                update(at, len(todo))
                name = f"{tokens} tokens, {kv_heads} heads of {head_dim}, page {page_size}"
                if time.monotonic() > self._deadline:
                    self.left_out.append(f"KV write: {name}: time was up")
                    continue
                seconds, exact = _write_seconds(
                    tokens, kv_heads, head_dim, page_size, self._dtype, self._platform
                )
                moved = 2 * tokens * 2 * kv_heads * head_dim * self._dtype.itemsize
                rows.append(
                    {
                        "name": name,
                        "tokens": tokens,
                        "us": 1e6 * seconds,
                        "gb_s": moved / seconds / 1e9,
                        "share_of_limit": self._limits.floor_seconds(moved, 0) / seconds,
                        "exact": exact,
                    }
                )
        return rows


def _compile(
    pool: ThreadPoolExecutor, case: Case, inputs: Inputs, backend: str
) -> tuple[Future[Any], Future[Any]]:
    """Starts to compile a single call, and a loop of them that takes turns over the page tables."""
    import jax

    from ...model.kernels.attention.api import ragged_paged_attention

    # One function for all calls, so that the kernel is traced and lowered once.
    @jax.jit
    def attend(q: Any, slab: Any, page_table: Any, lengths: tuple[Any, ...]) -> Any:
        kv_lens, *more = lengths  # not constants, of which XLA would compute ahead what it can
        return ragged_paged_attention(
            q,
            slab,
            kv_lens,
            page_table,
            *more,
            scale=case.head_dim**-0.5,
            decode_only=case.queries == 1,
            backend=backend,
        )

    @jax.jit
    def loop(q: Any, slab: Any, tables: tuple[Any, ...], lengths: tuple[Any, ...]) -> Any:
        def turn(_: int, q: Any) -> Any:
            for page_table in tables:  # unrolled, so that no kernel but attention's is between
                q = attend(q, slab, page_table, lengths)
            return q

        return jax.lax.fori_loop(0, LOOP, turn, q)

    q, slab, tables, lengths = inputs.q, inputs.slab, inputs.page_tables, inputs.lengths
    return (
        pool.submit(lambda: attend.lower(q, slab, tables[0], lengths).compile()),
        pool.submit(lambda: loop.lower(q, slab, tables, lengths).compile()),
    )


def _timed(loop: Any, first: Any, *rest: Any) -> float:
    """Seconds of one call of `loop`, as often in a row as makes a look at the clock harmless."""
    import jax

    from .device_limits import best_seconds

    first = jax.block_until_ready(loop(first, *rest))  # warms up, and compiles what is not yet
    begin = time.perf_counter()
    first = jax.block_until_ready(loop(first, *rest))
    once = time.perf_counter() - begin
    return best_seconds(loop, first, *rest, calls=max(1, round(LOOK_SECONDS / once)))


def _write_seconds(
    tokens: int, kv_heads: int, head_dim: int, page_size: int, dtype: Any, platform: str
) -> tuple[float, bool]:
    """Seconds of one call of write_kv, and whether what it wrote is exactly what it was given."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ...model.kernels.kv_write import write_kv

    pages = max(64, 4 * -(-tokens // page_size)) if platform == "cpu" else 8192
    draw = np.random.default_rng(0)
    shape = (tokens, kv_heads, head_dim)
    k, v = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (0, 1))
    places = [draw.choice(pages * page_size, tokens, replace=False) for _ in range(WRITE_PLACES)]
    where = tuple(
        tuple(jnp.asarray(part, jnp.int32) for part in np.divmod(place, page_size))
        for place in places
    )
    slab = jnp.zeros((pages, page_size, 2 * kv_heads, head_dim), dtype)

    def turn(slab: Any, k: Any, v: Any, where: Any) -> Any:
        for at, offset in where:
            slab = write_kv(slab, k, v, at, offset)
        return slab

    once = jax.jit(lambda slab, k, v, where: turn(slab, k, v, where))(slab, k, v, where[:1])
    got = np.asarray(once[where[0]])
    exact = np.array_equal(got[:, 0::2], np.asarray(k)) and np.array_equal(got[:, 1::2], v)

    def loop(slab: Any, k: Any, v: Any, where: Any) -> Any:
        return jax.lax.fori_loop(0, LOOP, lambda _, slab: turn(slab, k, v, where), slab)

    seconds = _timed(jax.jit(loop, donate_argnums=0), slab, k, v, where)
    return seconds / (LOOP * WRITE_PLACES), bool(exact)


def _tables(results: dict[str, Any]) -> list[Any]:
    limits = results["limits"]
    title = (
        f"attention, {results['dtype']}; limits measured here: copy {limits['copy_gb_s']:,.0f} "
        f"GB/s, matmul {limits['matmul_tflop_s']:.2f} TFLOP/s"
    )
    attention = table(title, "case", "backend", "us", "KV GB/s", "TFLOP/s", "of limit", "error")
    for row in results["attention"]:
        if "failed" in row:
            attention.add_row(row["name"], row["backend"], row["failed"][:60])
            continue
        attention.add_row(
            row["name"], row["backend"], f"{row['us']:,.1f}", f"{row['kv_gb_s']:,.1f}",
            f"{row['tflop_s']:.2f}", f"{row['share_of_limit']:.0%}", f"{row['error']:.1e}",
        )  # fmt: skip
    writes = table("KV write", "case", "us", "GB/s", "of limit", "exact")
    for row in results["kv_write"]:
        writes.add_row(
            row["name"], f"{row['us']:,.1f}", f"{row['gb_s']:,.2f}",
            f"{row['share_of_limit']:.0%}", "yes" if row["exact"] else "NO",
        )  # fmt: skip
    tables = [attention, writes]
    if results["left_out"]:
        left_out = table("left out", "")
        for text in results["left_out"]:
            left_out.add_row(text)
        tables.append(left_out)
    return tables


def _draw(figure: Any, results: dict[str, Any]) -> None:
    rows = [row for row in results["attention"] if "failed" not in row]
    labels = list(dict.fromkeys(row["name"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure.set_figheight(max(5, 1.5 + 0.2 * len(labels)))
    axes = figure.subplots()
    height = 0.8 / max(len(backends), 1)
    for at, backend in enumerate(backends):
        mine = [row for row in rows if row["backend"] == backend]
        places = [labels.index(row["name"]) + at * height for row in mine]
        axes.barh(places, [row["share_of_limit"] for row in mine], height, label=backend)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(labels))], labels, fontsize=7)
    middle, half = len(labels) / 2 - height / 2 - 0.1, max(len(labels), 4) / 2 + 0.1
    axes.set_ylim(middle + half, middle - half)  # few bars are no thicker than several
    axes.set_xlim(0, max(1, axes.get_xlim()[1]) if rows else 1)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel("share of the device's limit")
    if rows:
        axes.legend()
