"""How a training went, as a picture and as numbers, beside the model. Called by `__main__.py`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from .train import Record

PICTURE, NUMBERS = "loss.png", "training.json"
_NAMED = 9  # tasks that stand out, the hardest


def write_numbers(folder: Path, record: Record) -> None:
    """Writes NUMBERS: one line for each entry, so that it can be read and compared."""
    folder.mkdir(parents=True, exist_ok=True)
    values = asdict(record)
    lists = {name: values.pop(name) for name in ("losses", "exams")}
    text = json.dumps(values, indent=1)[:-2]
    for name, entries in lists.items():
        text += f',\n "{name}": [\n  ' + ",\n  ".join(map(json.dumps, entries)) + "\n ]"
    (folder / NUMBERS).write_text(text + "\n}\n", "utf-8")


def read_numbers(folder: Path) -> Record:
    return Record(**json.loads((folder / NUMBERS).read_text("utf-8")))


def draw(file: Path, record: Record) -> None:
    """Draws the losses, and the share of each task's held-out examples that is right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    million = record.tokens / max(record.steps, 1) / 1e6
    for name in (key for key in record.losses[0] if key != "step"):
        x = [entry["step"] * million for entry in record.losses]
        left.plot(x, [entry[name] for entry in record.losses], label=name, linewidth=1)
    x = [entry["step"] * million for entry in record.exams]
    left.plot(x, [entry["loss"] for entry in record.exams], "k--", label="demo, held out")
    left.set(xlabel="tokens, millions", ylabel="loss, nats per token", yscale="log")
    left.set_title("cross-entropy; of the draft, distance from demo", fontsize="small")
    left.legend(fontsize="small")
    last = record.exams[-1]["right"] if record.exams else {}
    for place, task in enumerate(sorted(last, key=lambda task: _share(last[task]))):
        shares = [_share(entry["right"].get(task)) for entry in record.exams]
        if place < _NAMED:
            right.plot(x, shares, label=task, linewidth=1)
        else:
            right.plot(x, shares, color="lightgray", linewidth=0.8, zorder=0)
    right.plot(x, [entry["agrees"] for entry in record.exams], "k--", label="draft agrees")
    right.set(xlabel="tokens, millions", ylabel="share", ylim=(0, 1))
    right.set_title("held-out examples with every token right", fontsize="small")
    right.legend(fontsize="x-small", ncols=2, loc="lower right")
    figure.savefig(file, dpi=110)


def _share(counts: list[int] | None) -> float:
    return counts[0] / counts[1] if counts else float("nan")
