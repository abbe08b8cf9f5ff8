"""`quire bench soak`: a server of our own under callers of every kind, for minutes; does it leak?

Starts `quire serve`, keeps many streams busy (readers, cancels, deadlines, broken connections, bad
requests), weighs the server's processes meanwhile, and at the end wants to see: every call ended as
it should, the server's log says the same of each request (soak_ledger.py), nothing runs or waits,
no page is held, no socket is left open, no process was started again (the engine checks its own
books when it is idle, and dies of what it finds), and memory does not grow.
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

MORE_FILES = 32
"""Files and sockets that a process may have more at rest than before: what it opens but once."""

_WEIGH_EVERY = 1.0
"""Seconds."""

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
    from .soak_ledger import Ledger, Seen
    from .soak_memory import growth, windows

    begin = time.monotonic()
    ended: Counter[str] = Counter()
    ledger = Ledger()
    before = server.weigh()
    weights = [(0.0, before)]
    misbehaved: list[str] = []

    def over() -> bool:
        return bool(misbehaved) or time.monotonic() - begin >= args.seconds or not server.alive

    async def call(seed: int) -> None:
        try:
            await call_until(over, server.address, seed, ledger, lambda how: ended.update((how,)))
        except Misbehaved as error:
            misbehaved.append(str(error))

    async def weigh() -> None:
        with Terminal().phase("soaking") as update:
            while not over():
                await asyncio.sleep(_WEIGH_EVERY)
                passed = time.monotonic() - begin
                weights.append((passed, await asyncio.to_thread(server.weigh)))
                update(min(int(passed), args.seconds), args.seconds)

    async with asyncio.TaskGroup() as group:
        group.create_task(weigh())
        for at in range(args.streams):
            group.create_task(call(args.seed + at))
    seconds = time.monotonic() - begin
    at_rest = await _at_rest(server)
    after = server.weigh()
    disagreements = ledger.disagreements(server.log())
    memory = {
        name: [(at, found[name].memory) for at, found in weights if name in found]
        for name in before
    }
    grew = {name: growth(samples) for name, samples in memory.items()}
    return {
        "seconds": seconds,
        "calls": sum(ended.values()),
        "ended": dict(ended.most_common()),
        "begun": ledger.count(Seen.BEGUN),
        "misbehaved": misbehaved[:5],
        "disagreements": disagreements[:5],
        "disagreements_in_all": len(disagreements),
        "memory_windows": {name: windows(samples) for name, samples in memory.items()},
        # What one gave back hides nothing that another took.
        "growth_bytes_per_minute": {**grew, "all": sum(max(by, 0.0) for by in grew.values())},
        "files": {
            name: {"before": before[name].files, "at_rest": weight.files}
            for name, weight in after.items()
            if name in before
        },
        "restarted": sorted(
            name for name in before if name not in after or after[name].pid != before[name].pid
        ),
        "at_rest": at_rest,
    }


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
    return {name: figures.get(name, -1) for name in (*_AT_REST, *_NEVER, "quire_engine_ready")}


_AT_REST = ("quire_requests_running", "quire_requests_waiting", "quire_kv_pages_used")
_NEVER = (
    "quire_failed_steps_total",
    "quire_compiles_after_ready_total",
    "quire_telemetry_dropped_requests_total",
)


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
    if count := results["disagreements_in_all"]:
        such = "; ".join(results["disagreements"])
        problems.append(f"{count} requests ended otherwise than their callers saw, such as {such}")
    problems += [f"the process {name} was started again" for name in results["restarted"]]
    for name, files in results["files"].items():
        if files["at_rest"] > files["before"] + MORE_FILES:
            problems.append(
                f"{name} has {files['at_rest']} files and sockets open at rest, and had "
                f"{files['before']} before"
            )
    for name, value in results["at_rest"].items():
        wanted = float(name == "quire_engine_ready")
        if value < 0:
            problems.append(f"at rest nothing was to be had of {name}")
        elif value != wanted:
            problems.append(f"at rest {name} is {value:g}, must be {wanted:g}")
    grew = results["growth_bytes_per_minute"]
    if grew["all"] > MAX_GROWTH:
        parts = ", ".join(f"{name} {by / 1e6:.2f}" for name, by in grew.items() if name != "all")
        problems.append(f"memory grew by {grew['all'] / 1e6:.2f} MB a minute ({parts})")
    if results["exit_status"]:
        problems.append(f"the server ended with status {results['exit_status']}")
    return problems


def _table(results: dict[str, Any]) -> Any:
    title = f"soak: {results['model']}, {results['streams']} streams, {results['seconds']:.0f} s"
    made = table(title, "", "", "", "")
    made.add_row("calls", f"{results['calls']:,}")
    for how, count in results["ended"].items():
        made.add_row(f"  {how}", f"{count:,}")
    made.add_row("requests with an answer, each ended once", f"{results['begun']:,}")
    for name, parts in results["memory_windows"].items():
        made.add_row(
            f"memory of {name}, MB: low at the end, most, growth a minute",
            f"{parts[-1].low / 1e6:,.0f}",
            f"{max(part.high for part in parts) / 1e6:,.0f}",
            f"{results['growth_bytes_per_minute'][name] / 1e6:+.2f}",
        )
    for name, files in results["files"].items():
        made.add_row(
            f"files and sockets of {name}: before, at rest",
            f"{files['before']}",
            f"{files['at_rest']}",
        )
    for name, value in results["at_rest"].items():
        made.add_row(f"at rest: {name}", f"{value:g}")
    for problem in results["problems"]:
        made.add_row(f"[red]{problem}[/]")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    """Lows as lines, and up to the highs shades."""
    from .soak_memory import SETTLED_AFTER

    axes = figure.subplots()
    for name, parts in results["memory_windows"].items():
        minutes = [part.at / 60 for part in parts]
        lows, highs = [part.low / 1e6 for part in parts], [part.high / 1e6 for part in parts]
        (line,) = axes.plot(minutes, lows, label=name)
        axes.fill_between(minutes, lows, highs, color=line.get_color(), alpha=0.2)
        axes.axvline(SETTLED_AFTER * minutes[-1], color="0.6", linestyle=":")
    axes.set(
        title=f"memory of a server under {results['streams']} streams",
        xlabel="minutes",
        ylabel="MB resident",
        ylim=(0, None),
    )
    axes.legend()
