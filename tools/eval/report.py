"""From outcomes to figures: the JSON object, the tables and the picture of `quire eval`.

    {"tasks": {NAME: {"accuracy": …, "n": …, …}}, "nll": …, "nll_ci95": [low, high]}

is what `--json` prints; `--draft` and `--baseline` add a key each. Beside accuracy and number each
task says:

accuracy_ci95              Wilson's interval
nll, nll_ci95              per token of its right answers; null where none could be scored, the
                           interval also where only one could
tokens                     the number of those, of each scored answer
cut_off, failed            answers that grew too long or that the engine failed on; counted as wrong
too_long, refused          examples left out: of n they are no part
levels                     where it has several: {difficulty: {accuracy, n}}
examples, right, nlls      which examples (a hash), and what became of each of them, in order: what
                           a later run needs to compare example by example (compare.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from .intervals import Estimate, per_token, share

if TYPE_CHECKING:
    from rich.table import Table

    from .answers import Outcome
    from .questions import Paper


@dataclass(frozen=True, slots=True)
class Result:
    """A paper and what became of its questions, in their order."""

    paper: Paper
    outcomes: list[Outcome]

    @property
    def scored(self) -> list[tuple[float, int]]:
        """(nll, tokens) of each right answer that could be scored."""
        pairs = zip(self.paper.questions, self.outcomes, strict=True)
        return [(o.nll, len(q.right)) for q, o in pairs if o.nll is not None]


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """The JSON object."""
    nll = _nll([result.scored for result in results])
    return {"tasks": {result.paper.task.name: _task(result) for result in results}, **nll}


def _task(result: Result) -> dict[str, Any]:
    paper, outcomes = result.paper, result.outcomes
    found = _accuracy(outcomes)
    found |= _nll([result.scored])
    found["tokens"] = [count for _, count in result.scored]
    found["cut_off"] = sum(outcome.cut_off for outcome in outcomes)
    found["failed"] = sum(bool(outcome.error) for outcome in outcomes)
    found["too_long"], found["refused"] = paper.too_long, paper.refused
    levels: dict[int, list[Outcome]] = {}
    for question, outcome in zip(paper.questions, outcomes, strict=True):
        levels.setdefault(question.example.difficulty, []).append(outcome)
    if len(levels) > 1:
        found["levels"] = {str(level): _accuracy(levels[level]) for level in sorted(levels)}
    found["examples"] = paper.fingerprint
    found["right"] = "".join(str(int(outcome.right)) for outcome in outcomes)
    found["nlls"] = [None if o.nll is None else round(o.nll, 4) for o in outcomes]
    return found


def _accuracy(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    n = len(outcomes)
    if not n:
        return {"accuracy": None, "n": 0, "accuracy_ci95": [None, None]}
    found = share(sum(outcome.right for outcome in outcomes), n)
    return {"accuracy": round(found.value, 6), "n": n, "accuracy_ci95": found.ci}


def _nll(groups: Sequence[Sequence[tuple[float, int]]]) -> dict[str, Any]:
    if not any(groups):
        return {"nll": None, "nll_ci95": [None, None]}
    found = per_token(groups)
    ci = found._replace(low=max(found.low, 0.0)).ci if isfinite(found.high) else [None, None]
    return {"nll": round(found.value, 6), "nll_ci95": ci}


def table_of(model: str, found: dict[str, Any]) -> Table:
    """The same for people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"eval: {model}"), title_justify="left", box=None, pad_edge=False)
    table.add_column("task")
    for name in ("accuracy", "95 %", "n", "nll/token", "95 %"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, task in found["tasks"].items():
        nll = (_number(task["nll"]), _span(task["nll_ci95"], "{:.4f}"))
        table.add_row(name, *_shares(task), *nll, _remarks(task))
        for level, part in task.get("levels", {}).items():
            table.add_row(f"  level {level}", *_shares(part))
    tokens = sum(sum(task["tokens"]) for task in found["tasks"].values())
    nll = (_number(found["nll"]), _span(found["nll_ci95"], "{:.4f}"))
    table.add_row("all", "", "", "", *nll, f"{tokens:,} tokens of right answers")
    return table


def _shares(part: dict[str, Any]) -> tuple[str, str, str]:
    accuracy = "—" if part["accuracy"] is None else f"{part['accuracy']:.1%}"
    return accuracy, _span(part["accuracy_ci95"], "{:.1%}"), str(part["n"])


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _span(ci: Sequence[float | None], form: str) -> str:
    return "" if None in ci else " to ".join(form.format(bound) for bound in ci)


_REMARKS = {
    "cut_off": "cut off",
    "failed": "failed",
    "too_long": "too long for the context, left out",
    "refused": "refused by the template, left out",
}


def _remarks(task: dict[str, Any]) -> str:
    return "; ".join(f"{task[key]} {text}" for key, text in _REMARKS.items() if task[key])


def draw(figure: Any, model: str, found: dict[str, Any]) -> None:
    """Accuracy by task with its intervals, on a matplotlib figure."""
    axes = figure.subplots()
    tasks = {name: t for name, t in found["tasks"].items() if t["accuracy"] is not None}
    spans = [Estimate(t["accuracy"], *t["accuracy_ci95"]) for t in tasks.values()]
    errors = [[s.value - s.low for s in spans], [s.high - s.value for s in spans]]
    axes.barh(list(tasks), [s.value for s in spans], xerr=errors, capsize=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, with 95 % intervals")
    axes.set_title(f"{model}: nll per token {_number(found['nll'])}")
