"""One run against an earlier one: `quire eval MODEL --baseline FILE`, where FILE holds what an
earlier `--json` printed.

Where both asked the same examples they are compared one by one, which tells apart what two
separate intervals could not. All differences are judged together: if nothing changed, 95 of 100
comparisons find nothing, however many tasks there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InvalidRequest
from .intervals import Estimate, paired_shares, per_token, unpaired_shares, z_of

if TYPE_CHECKING:
    from rich.table import Table

NLL = "nll per token"


@dataclass(frozen=True, slots=True)
class Difference:
    """How a figure changed.

    Attributes:
      name: a task, for its accuracy; or NLL.
      before, after: the figure in both runs.
      change: from before to after, with an interval that holds for all differences together.
      paired: on the same examples.
    """

    name: str
    before: float
    after: float
    change: Estimate
    paired: bool

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "within noise"."""
        if self.change.low <= 0 <= self.change.high:
            return "within noise"
        return "better" if (self.change.value < 0) == (self.name == NLL) else "worse"

    def as_json(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "change": round(self.change.value, 6),
            "change_ci": self.change.ci,
            "paired": self.paired,
            "verdict": self.verdict,
        }


def read_baseline(file: str) -> dict[str, Any]:
    """The object that an earlier run printed last.

    Raises:
      InvalidRequest: it is not there, or something else.
    """
    try:
        lines = [s for s in Path(file).expanduser().read_text("utf-8").splitlines() if s.strip()]
        found = json.loads(lines[-1])
        for task in found["tasks"].values():
            float(task["accuracy"] or 0), int(task["n"])
        return {"nll": None, **found}
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"--baseline: {file}: {error}") from error
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"--baseline: {file}: its last line must be what `quire eval --json` prints"
        ) from error


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[Difference], list[str]]:
    """The differences, and notes on what could not be compared.

    Args:
      before, after: as report.figures makes them.
    """
    old, new = before["tasks"], after["tasks"]
    common = [name for name in new if name in old and old[name]["n"] and new[name]["n"]]
    notes = [f"only in one of both: {name}" for name in {**new, **old} if name not in common]
    scored = [name for name in common if _same_tokens(old[name], new[name])]
    if scored != common:
        notes.append(
            f"{NLL}: compared on {', '.join(scored) or 'no task'} alone: elsewhere other examples "
            "or tokens"
        )
    z = z_of(0.95, len(common) + bool(scored))
    differences = [_accuracy(name, old[name], new[name], z) for name in common]
    if scored:
        differences.append(_nll([(old[name], new[name]) for name in scored], z))
    return differences, notes


def _accuracy(name: str, old: dict[str, Any], new: dict[str, Any], z: float) -> Difference:
    paired = _same_examples(old, new)
    if paired:
        pairs = list(zip(old["right"], new["right"], strict=True))
        change = paired_shares(pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs), z)
    else:
        change = unpaired_shares((old["accuracy"], old["n"]), (new["accuracy"], new["n"]), z)
    return Difference(name, old["accuracy"], new["accuracy"], change, paired)


def _nll(tasks: Sequence[tuple[dict[str, Any], dict[str, Any]]], z: float) -> Difference:
    def rate(runs: Sequence[dict[str, Any]]) -> float:
        return per_token([list(zip(_scored(r), r["tokens"], strict=True)) for r in runs]).value

    groups = []
    for old, new in tasks:
        changes = (b - a for a, b in zip(_scored(old), _scored(new), strict=True))
        groups.append(list(zip(changes, new["tokens"], strict=True)))
    before, after = rate([old for old, _ in tasks]), rate([new for _, new in tasks])
    return Difference(NLL, round(before, 6), round(after, 6), per_token(groups, z), paired=True)


def _scored(task: dict[str, Any]) -> list[float]:
    return [value for value in task["nlls"] if value is not None]


def _same_examples(old: dict[str, Any], new: dict[str, Any]) -> bool:
    same = old.get("examples") == new["examples"]
    return same and len(old.get("right", "")) == len(new["right"])


def _same_tokens(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the same right answers were scored, cut into tokens alike."""
    if not _same_examples(old, new) or old.get("tokens") != new["tokens"] or not new["tokens"]:
        return False
    return [v is None for v in old["nlls"]] == [v is None for v in new["nlls"]]


def table_of(differences: Sequence[Difference], file: str) -> Table:
    """The same for people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"against {file}"), title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in ("before", "now", "change", "95 % of all"):
        table.add_column(name, justify="right")
    table.add_column("")
    for d in differences:
        form = "{:+.4f}" if d.name == NLL else "{:+.1%}"
        plain = form.replace("+", "")
        span = f"{form.format(d.change.low)} to {form.format(d.change.high)}"
        how = "" if d.paired else " (other examples)"
        change = form.format(d.change.value)
        row = (d.name, plain.format(d.before), plain.format(d.after), change, span)
        table.add_row(*row, d.verdict + how)
    return table
