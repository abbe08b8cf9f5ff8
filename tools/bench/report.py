"""What a benchmark hands back: one JSON object, a table, a picture. Used by every benchmark.

The object says what was measured, on what, with what, when and by which command, so that a figure
never stands alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...errors import InvalidConfig
from .. import standard_streams

if TYPE_CHECKING:
    from rich.table import Table

Draw = Callable[[Any], None]
"""Draws the results on a matplotlib figure."""


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds --json and --plot."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="print one JSON object; the table goes to stderr"
    )
    group.add_argument("--plot", metavar="FILE", help="also draw the results, into a .png or .svg")


def check_output(args: argparse.Namespace) -> None:
    """Raises before anything that takes long if the results could not be handed over."""
    standard_streams.stdout()
    if args.plot is None:
        return
    if find_spec("matplotlib") is None:
        raise InvalidConfig("--plot: needs matplotlib; install it by pip install 'quire[bench]'")
    if not Path(args.plot).expanduser().resolve().parent.is_dir():
        raise InvalidConfig(f"--plot: got {args.plot!r}, must be in a folder that exists")
    if Path(args.plot).suffix.lower() not in (".png", ".svg"):
        raise InvalidConfig(f"--plot: got {args.plot!r}, must end in .png or .svg")


def finish(
    args: argparse.Namespace,
    results: dict[str, Any],
    tables: Sequence[Table],
    draw: Draw,
    *,
    on_device: bool = True,
) -> None:
    """Prints and draws the results.

    Args:
      args: of the command; `args.bench` is its name.
      results: what goes into JSON as it is.
      tables: the same for people.
      draw: makes the picture of --plot.
      on_device: whether a device was measured, so that it must be named.
    """
    from rich.console import Console

    if args.plot is not None:
        _plot(args, draw)
    report = {"bench": args.bench, **surroundings(on_device), **results}
    console = Console(file=sys.stderr if args.json else sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 140  # a log has no width; rich would take 80
    for table in tables:
        console.print(table, "")
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")


def surroundings(on_device: bool = True) -> dict[str, Any]:
    """Where, when, with what."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["quire", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"quire": __version__, "python": platform.python_version()},
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if on_device:
        import jax

        device = jax.devices()[0]
        found["versions"] |= {"jax": jax.__version__, "jaxlib": version("jaxlib")}
        found["device"] = {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(jax.devices()),
            "memory": device.memory_stats(),  # None on CPU
        }
    return found


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and the rest numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for at, name in enumerate(columns):
        made.add_column(name, justify="right" if at else "left")
    return made


def over_sizes(axes: Any, sizes: Sequence[int], *, x: str, y: str) -> None:
    """Finishes a plot of values from zero up over sizes, such as batches: doublings are equally far
    apart, and ticks stand at what was measured alone, be it one."""
    axes.set(xlabel=x, ylabel=y)
    if not sizes:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
        return
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)


def _plot(args: argparse.Namespace, draw: Draw) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(9, 5), layout="constrained")
    draw(figure)
    figure.savefig(Path(args.plot).expanduser(), dpi=150)
    pyplot.close(figure)
