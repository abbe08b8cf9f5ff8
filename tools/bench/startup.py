"""`quire bench startup`: from the start of a process to its first token, by phase.

Each run is a process of its own (startup_child.py), as a person's would be. The first finds nothing
stored; the next ones find what it left. Phases may overlap. The files of the weights are in the
system's page cache after the first run, and may have been before: this is about programs, not
disks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from ...errors import Internal
from ..flags import positive
from .models import add_engine, check_fits, engine_config
from .report import add_output, check_output, finish, table

if TYPE_CHECKING:
    from ...serving.progress import Reporter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--runs", type=positive, default=3, metavar="N", help="after the cold one (default: 3)"
    )
    group.add_argument(
        "--prompt-tokens", type=positive, default=128, metavar="N", help="(default: 128)"
    )
    add_output(parser)
    # Where programs are kept is what this measures: a new folder, gone afterwards.
    add_engine(parser, skip=("cache_dir",))


def run(args: argparse.Namespace) -> None:
    check_output(args)
    config = engine_config(args)
    check_fits(config, "prompt_tokens", args.prompt_tokens, 1)
    from ...serving.progress import Terminal

    reporter = Terminal()
    with tempfile.TemporaryDirectory(prefix="quire-startup-") as folder:
        settings = {**asdict(config), "cache_dir": folder}
        cold = _child(settings, args.prompt_tokens, "cold", reporter)
        stored = _bytes_in(folder)
        warm = [
            _child(settings, args.prompt_tokens, f"warm {at + 1} of {args.runs}", reporter)
            for at in range(args.runs)
        ]
    results = {
        "device": cold["device"],
        "versions": cold["versions"],
        "settings": {k: v for k, v in asdict(config).items() if v is not None},
        "prompt_tokens": args.prompt_tokens,
        "cold": cold,
        "warm": warm,
        "stored_bytes": stored,
        "seconds_to_first_token": {
            "cold": cold["seconds"],
            "warm": median(run["seconds"] for run in warm),
        },
    }
    # JAX stays out of this process, which would hold the device that the children need.
    finish(args, results, [_table(results)], lambda f: _draw(f, results), on_device=False)


def _child(
    settings: dict[str, Any], prompt_tokens: int, name: str, reporter: Reporter
) -> dict[str, Any]:
    """One process: its seconds, phases and compilations."""
    with reporter.phase(name):
        request = {
            "settings": settings,
            "prompt_tokens": prompt_tokens,
            "spawned": time.monotonic(),
        }
        command = [sys.executable, "-P", "-m", f"{__package__}.startup_child"]
        done = subprocess.run([*command, json.dumps(request)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Internal(f"bench startup: the {name} run failed: {last.removeprefix('quire: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def _bytes_in(folder: str) -> int:
    from pathlib import Path

    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _table(results: dict[str, Any]) -> Any:
    runs = {"cold": results["cold"]}
    runs |= {f"warm {at + 1}": run for at, run in enumerate(results["warm"])}
    made = table(f"startup: {results['settings']['model']}", "seconds", *runs)
    phases = list(dict.fromkeys(name for run in runs.values() for name in run["phases"]))
    for name in phases:
        made.add_row(name, *(f"{run['phases'].get(name, 0):.2f}" for run in runs.values()))
    made.add_row("to first token", *(f"{run['seconds']:.2f}" for run in runs.values()))
    for name in ("compiled by XLA", "read from the cache", "found in the store"):
        key = name.replace(" ", "_")
        made.add_row(name, *(str(run["programs"][key]) for run in runs.values()))
    made.add_row("stored bytes", f"{results['stored_bytes']:,}")
    return made


def _draw(figure: Any, results: dict[str, Any]) -> None:
    """A row for each phase: they overlap, so that no bar of all would end where a run did."""
    axes = figure.subplots()
    runs = {"cold": results["cold"], "warm": results["warm"][-1]}
    phases = list(dict.fromkeys(name for run in runs.values() for name in run["phases"]))
    for at, (name, run) in enumerate(runs.items()):
        places = [row + 0.4 * (at - 0.5) for row in range(len(phases) + 1)]
        seconds = [*(run["phases"].get(phase, 0.0) for phase in phases), run["seconds"]]
        bars = axes.barh(places, seconds, 0.4, label=name)
        axes.bar_label(bars, fmt=" {:.2f}", fontsize=8)
    axes.set_yticks(range(len(phases) + 1), [*phases, "to first token"])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="seconds", title=f"start of {results['settings']['model']}")
    axes.legend()
