"""tools/thoughts.py, and `quire chat --thinking`, which uses it."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import fake_exam
import pytest

from quire.tools.cli import main
from quire.tools.thoughts import Thoughts

SMALL = ["--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=32", "--page-size=16"]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("open", "text", "thoughts", "answer"),
    [
        (True, "a < b\n</think>\n\n4 </think>\n", "a < b\n", "4 </think>\n"),
        (False, "\n<think>\nso\n</think>\n\n\n4", "so\n", "4"),
        (False, "<thin air", "", "<thin air"),
        (False, "\nno thoughts", "", "no thoughts"),
        (True, "never done </thin", "never done </thin", ""),
        (True, "</think>4", "", "4"),
        (False, " <th", "", " <th"),
    ],
)
def test_thoughts_and_answer_however_they_come(
    open: bool, text: str, thoughts: str, answer: str, size: int
) -> None:
    said = Thoughts(open=open)
    parts = [said.hear(text[at : at + size]) for at in range(0, len(text), size)] + [said.end()]
    assert ("".join(t for t, _ in parts), "".join(a for _, a in parts)) == (thoughts, answer)
    assert (said.thoughts, said.answer) == (thoughts, answer)


def test_what_is_certain_is_not_held_back() -> None:
    said = Thoughts(open=True)
    assert said.hear("one <") == ("one ", "")
    assert said.hear(" two") == ("< two", "")


def test_chat_shows_thoughts_apart(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chat(model: Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        flags = ["--thinking", "--temperature=0", "--max-tokens=12", "--ignore-eos", *SMALL]
        status = main(["chat", str(model), *flags])
        said = capsys.readouterr()
        return status, said.out, said.err

    status, out, err = chat(fake_exam.write(tmp_path))  # it never comes to an end of its thoughts
    assert (status, out) == (0, "\n") and len(err.splitlines()[-1]) >= 12
    status, out, err = chat(folder)
    assert (status, out) == (1, "") and "ignores it (enable_thinking)" in err.splitlines()[-1]
    assert "loading" not in err
