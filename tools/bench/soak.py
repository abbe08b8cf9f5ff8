"""`quire bench soak`: a server of our own under callers of every kind, for minutes; does it leak?

Starts `quire serve`, keeps many streams busy (readers, cancels, deadlines, broken connections, bad
requests), weighs the server's processes meanwhile, and at the end wants to see: every call ended as
it should, nothing runs or waits, no page is held, the engine is well (it checks its own books when
it is idle), and memory does not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Internal
from ..flags import MODEL_HELP, from_zero, positive
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    from .server_process import ServerProcess

MAX_GROWTH = 1e6
"""Bytes a minute that all processes together may grow."""

_WEIGH_EVERY = 2.0
_SETTLED_AFTER = 0.2
"""Share of the time after which growth counts: pools, caches and heaps have filled by then."""

_START = 600.0
_REST = 60.0
"""Seconds within which all must be over."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument("--model", default="demo", help=f"{MODEL_HELP} (default: demo)")
    group.add_argument("--seconds", type=positive, default=600, metavar="N", help="(default: 600)")
    group.add_argument(
        "--streams", type=positive, default=512, metavar="N", help="calls at once (default: 512)"
    )
    group.add_argument(
        "--seed", type=from_zero, default=0, help="of all that is drawn (default: 0)"
    )
    group.add_argument(
        "--serve",
        action="append",
        default=[],
        metavar="FLAG",
        help="a flag for `quire serve`, such as --serve=--frontends=2; may be repeated",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    check_output(args)
    from .server_process import ServerProcess

    log = Path(tempfile.mkdtemp(prefix="quire-soak-")) / "server.log"
    server = ServerProcess([args.model, *args.serve], log)
    try:
        server.wait_ready(_START)
        found = asyncio.run(_soak(args, server))
    finally:
        status = server.stop()
    found["exit_status"] = status
    results = {"model": args.model, "streams": args.streams, "seed": args.seed, **found}
    results["problems"] = _problems(results)
    finish(args, results, [_table(results)], lambda fig: _draw(fig, results), on_device=False)
    if results["problems"]:
        raise Internal(f"{'; '.join(results['problems'])}; the server's log: {log}")


async def _soak(args: argparse.Namespace, server: ServerProcess) -> dict[str, Any]:
    from ...serving.progress import Terminal
    from .soak_callers import Misbehaved, call_until

    begin = time.monotonic()
    ended: Counter[str] = Counter()
    weights: list[tuple[float, dict[int, int]]] = []
    misbehaved: list[str] = []

    def over() -> bool:
        return bool(misbehaved) or time.monotonic() - begin >= args.seconds or not server.alive

    async def call(seed: int) -> None:
        try:
            await call_until(over, server.address, seed, lambda how: ended.update((how,)))
        except Misbehaved as error:
            misbehaved.append(str(error))

    async def weigh() -> None:
        with Terminal().phase("soaking") as update:
            while not over():
                passed = time.monotonic() - begin
                weights.append((passed, await asyncio.to_thread(server.memory)))
                update(min(int(passed), args.seconds), args.seconds)
                await asyncio.sleep(_WEIGH_EVERY)

    async with asyncio.TaskGroup() as group:
        group.create_task(weigh())
        for at in range(args.streams):
            group.create_task(call(args.seed + at))
    return {
        "seconds": time.monotonic() - begin,
        "calls": sum(ended.values()),
        "ended": dict(ended.most_common()),
        "misbehaved": misbehaved[:5],
        "memory": [(passed, sum(bytes_.values())) for passed, bytes_ in weights],
        "processes": len(weights[-1][1]) if weights else 0,
        "growth_bytes_per_minute": growth(
            [(passed, sum(bytes_.values())) for passed, bytes_ in weights]
        ),
        "at_rest": await _at_rest(server),
    }


def growth(samples: list[tuple[float, int]]) -> float:
    """Bytes a minute, by least squares over the samples after things have settled."""
    import numpy as np

    if not samples:
        return 0.0
    first = _SETTLED_AFTER * samples[-1][0]
    settled = [(at, size) for at, size in samples if at >= first]
    if len(settled) < 3:
        return 0.0
    times, sizes = np.array(settled, np.float64).T
    return float(np.polyfit(times / 60, sizes, 1)[0])


async def _at_rest(server: ServerProcess) -> dict[str, float]:
    """What the engine says once nobody calls: waits until nothing is left, or too long."""
    end = time.monotonic() + _REST
    while True:
        figures = await asyncio.to_thread(_scrape, server.metrics) if server.alive else {}
        busy = [figures.get(name, -1) for name in _AT_REST]
        if busy == [0] * len(busy) or time.monotonic() > end or not server.alive:
            break
        await asyncio.sleep(0.5)
    await asyncio.sleep(2)  # an idle engine checks its books, and dies of what it finds
    figures = await asyncio.to_thread(_scrape, server.metrics) if server.alive else {}
    return {name: figures.get(name, -1) for name in (*_AT_REST, "quire_engine_ready")}


_AT_REST = ("quire_requests_running", "quire_requests_waiting", "quire_kv_pages_used")


def _scrape(address: str) -> dict[str, float]:
    """Metrics without labels, by name; none if they cannot be had."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


def _problems(results: dict[str, Any]) -> list[str]:
    problems = [f"a caller saw: {what}" for what in results["misbehaved"]]
    for name, value in results["at_rest"].items():
        wanted = float(name == "quire_engine_ready")
        if value != wanted:
            problems.append(f"at rest {name} is {value:g}, must be {wanted:g}")
    if results["growth_bytes_per_minute"] > MAX_GROWTH:
        problems.append(
            f"memory grew by {results['growth_bytes_per_minute'] / 1e6:.2f} MB a minute"
        )
    if results["exit_status"]:
        problems.append(f"the server ended with status {results['exit_status']}")
    return problems


def _table(results: dict[str, Any]) -> Any:
    title = f"soak: {results['model']}, {results['streams']} streams, {results['seconds']:.0f} s"
    made = table(title, "", "")
    made.add_row("calls", f"{results['calls']:,}")
    for how, count in results["ended"].items():
        made.add_row(f"  {how}", f"{count:,}")
    made.add_row("memory at the end, MB", f"{results['memory'][-1][1] / 1e6:,.0f}")
    made.add_row("growth, MB a minute", f"{results['growth_bytes_per_minute'] / 1e6:,.2f}")
    for name, value in results["at_rest"].items():
        made.add_row(f"at rest: {name}", f"{value:g}")
    for problem in results["problems"]:
        made.add_row(f"[red]{problem}[/]")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    axes = figure.subplots()
    times, sizes = zip(*results["memory"], strict=True)
    axes.plot([t / 60 for t in times], [size / 1e6 for size in sizes])
    axes.axvline(_SETTLED_AFTER * times[-1] / 60, color="0.6", linestyle=":")
    axes.set(
        title=f"memory of {results['processes']} processes under {results['streams']} streams",
        xlabel="minutes",
        ylabel="MB resident",
        ylim=(0, None),
    )
