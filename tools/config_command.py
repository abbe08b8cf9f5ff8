"""`quire config show [MODEL] [--config FILE] [flags]`: the settings in force, each with its source.

With a model also what the settings left open comes to on this device; reads no weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..config import EngineConfig, settings_of
from ..environment import default_cache_dir
from ..errors import InvalidConfig
from . import standard_streams
from .flags import add_model, add_settings, given_settings
from .settings_file import CONFIGS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    summary = "print the settings in force, and where each comes from"
    show = actions.add_parser("show", help=summary, description=summary, allow_abbrev=False)
    add_model(show)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    for config in CONFIGS:
        add_settings(show, config, skip=("model",))


def run(args: argparse.Namespace) -> None:
    standard_streams.stdout()
    settings: dict[str, dict[str, Any]] = {}
    for config in CONFIGS:
        settings |= _in_force(args, config)
    report: dict[str, Any] = {"settings": settings}
    if settings["model"]["value"]:
        report |= _settled(settings)
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(report)


def _in_force(args: argparse.Namespace, config: type) -> dict[str, dict[str, Any]]:
    """Each setting's value and source: "default", "flag" or "FILE:LINE"."""
    given = given_settings(args, config)
    made = config(**{name: one.value for name, one in given.items()})
    return {
        s.name: {
            "value": getattr(made, s.name),
            "source": given[s.name].source if s.name in given else "default",
        }
        for s in settings_of(config)
    }


def _settled(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What None comes to, for this model on this device."""
    from ..serving.assemble import make_startup, open_checkpoint, start_devices
    from .inspect_command import memory

    names = [s.name for s in settings_of(EngineConfig)]
    config = EngineConfig(**{name: settings[name]["value"] for name in names})
    try:
        checkpoint = open_checkpoint(config)
        mesh = start_devices(config, checkpoint)
        sizes = make_startup(config, checkpoint, mesh).measured_sizes()
    except InvalidConfig as error:
        name = str(error).partition(":")[0]
        source = settings.get(name, {}).get("source", "")
        raise InvalidConfig(f"{source}: {error}" if ":" in source else str(error)) from error
    return {"settled": memory(sizes, mesh.platform), "notes": list(sizes.notes)}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .inspect_command import row

    width = None if sys.stdout.isatty() else 1000  # in a pipe no path is broken in two
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for name, entry in report["settings"].items():
        table.add_row(name, _shown(name, entry["value"]), entry["source"])
    console.print(table)
    if "settled" in report:
        settled = Table("", "settled", box=None, pad_edge=False)
        for name, value in report["settled"].items():
            settled.add_row(*row(name, value))
        console.print("", settled)
    for note in report.get("notes", ()):
        console.print(f"note: {note}", soft_wrap=True)


def _shown(name: str, value: Any) -> str:
    if value is None:
        known = {"revision": "(the main branch)", "cache_dir": f"({default_cache_dir()})"}
        is_open = name != "model" and name in {s.name for s in settings_of(EngineConfig)}
        return known.get(name, "(settled at start)" if is_open else "(none)")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ", ".join(value) or "(none)"
    return str(value) if value != "" else '""'
