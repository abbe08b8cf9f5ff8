"""`quire doctor`: checks this machine and this installation, and says what to do.

Exit status 1 if anything would keep an engine from running as it should.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from ..errors import InvalidConfig
from . import standard_streams

if TYPE_CHECKING:
    from .doctor_checks import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    standard_streams.stdout()
    from .doctor_checks import FAIL, all_checks
    from .doctor_probes import this_machine

    checks = all_checks(this_machine())
    failed = [check for check in checks if check.status == FAIL]
    if args.json:
        report = {"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _show(checks)
    if failed:
        raise InvalidConfig(f"{len(failed)} of {len(checks)} checks failed: {failed[0].advice}")


def _show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "fail": ("✗", "red")}
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in checks:
        mark, style = marks[check.status]
        found = Text(check.found)
        if check.advice:
            found.append(f"\n→ {check.advice}")
        table.add_row(Text(mark, style=style), check.name, found)
    # In a pipe no line of advice is broken in two.
    width = None if sys.stdout.isatty() else 1000
    Console(file=sys.stdout, highlight=False, width=width).print(table)
