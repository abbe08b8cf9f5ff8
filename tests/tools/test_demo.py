"""`quire demo`: what it asks, what it says of the answers, and when it fails."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import fake_exam
import pytest
from rich.console import Console

from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.shipped import SHIPPED, resolve
from quire.errors import Internal
from quire.tools import demo_command
from quire.tools.cli import main
from quire.tools.demo import scenes, stage
from quire.tools.demo.stage import Asked
from quire.tools.tasks.registry import TASKS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_exam.write(tmp_path_factory.mktemp("model"))


def test_it_asks_every_task_that_is_short_and_one_long_table(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    asked = scenes.scenes(checkpoint, 0)
    assert list(dict.fromkeys(e.task for e in asked.chat)) == list(scenes.CHAT)
    assert len(asked.chat) > 2 and all(len(e.messages) == 2 for e in asked.chat)
    assert all(e.check(e.messages[-1]["content"]) for e in asked.chat)
    names = [e.task for e in asked.batch]
    assert len(names) == len(set(names)) >= sum(task.share > 0 for task in TASKS.values()) - 3
    assert len(asked.table) == 20 and len({str(e.messages[0]) for e in asked.table}) == 1
    assert keys(asked) == keys(scenes.scenes(checkpoint, 0))
    assert keys(asked) != keys(scenes.scenes(checkpoint, 1))


def keys(asked: scenes.Scenes) -> list[str]:
    return [e.key for e in (*asked.chat, *asked.batch, *asked.table)]


def answered(right: int, wrong: int, hard_wrong: int) -> list[Asked]:
    def one(said: str, hard: bool) -> Asked:
        task = next(t for t in TASKS.values() if t.hard == hard)
        example = fake_exam.question("4").example
        example = type(example)(task.name, "4", example.messages, example.check)
        return Asked(example, [1], 1, text=said, finished=True)

    return [one("4", False)] * right + [one("5", False)] * wrong + [one("5", True)] * hard_wrong


def test_too_few_right_answers_are_an_error() -> None:
    demo_command.check(answered(right=8, wrong=2, hard_wrong=5))
    with pytest.raises(
        Internal, match="7 of 10 answers are right, must be at least 80%; wrong: '5'"
    ):
        demo_command.check(answered(right=7, wrong=3, hard_wrong=0))
    cut_off = answered(right=1, wrong=0, hard_wrong=0)
    cut_off[0].finished = False
    with pytest.raises(Internal):
        demo_command.check(cut_off)


def test_an_answer_is_shown_without_its_thoughts_and_in_one_line() -> None:
    (asked,) = answered(1, 0, 0)
    asked.text = "so\n</think>\n\nfor\n4"
    assert asked.answer == "for 4" and asked.question == "?"


def test_marks_are_seen_on_a_narrow_terminal() -> None:
    asked = answered(right=1, wrong=1, hard_wrong=1)
    for a in asked:
        words = {"role": "user", "content": "word " * 20}
        a.example = replace(a.example, messages=(words, *a.example.messages[1:]))
    for a in asked[1:]:
        a.text *= 200
    console = Console(width=80, file=io.StringIO())
    console.print(stage._answers(asked))
    lines = console.file.getvalue().splitlines()[1:]
    assert [line[0] for line in lines] == ["✓", "✗", "✗"] and max(map(len, lines)) <= 80


def test_the_shipped_model_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=64"]) == 0
    said = capsys.readouterr().out
    assert "a chat" in said and "at once" in said and "right answers" in said


def test_a_model_that_knows_nothing_fails_but_shares_the_table(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_command, "MODEL", str(model))
    table = scenes.scenes(Checkpoint.open(model), 0).table
    few = scenes.Scenes([fake_exam.double(random.Random(0))], [], table)
    monkeypatch.setattr(scenes, "scenes", lambda checkpoint, seed: few)
    assert main(["demo", "--no-warmup", "--max-batched-tokens=256"]) == 1
    said = capsys.readouterr()
    assert "0 of 21 answers are right" in said.err.splitlines()[-1]
    (hits,) = (line for line in said.out.splitlines() if line.startswith("of them found"))
    assert int(hits.split()[-1].removesuffix("%")) > 90


def test_every_shipped_name_is_a_model() -> None:
    assert "demo" in SHIPPED
    for name in SHIPPED:
        assert Checkpoint.open(resolve(name)).has_tokenizer
