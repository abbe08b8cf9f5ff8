"""What people see on stderr."""

from __future__ import annotations

import io
import sys

import pytest

from quire.serving import progress
from quire.serving.progress import Terminal


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_pipe_a_phase_is_a_line_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal().phase("loading") as update:
        update(1, 3)
        update(3, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.split()[0] == "loading" and line.endswith(" s")


def test_in_a_pipe_a_long_phase_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with Terminal().phase("loading") as update:
        for done in range(1, 4):
            update(done, 3)
    lines = capsys.readouterr().err.splitlines()
    assert [" ".join(line.split()) for line in lines[:-1]] == ["loading 1 of 3", "loading 2 of 3"]


def test_on_a_terminal_there_is_a_bar_and_then_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with terminal.phase("loading") as update:
        update(1, 2)
    terminal.close()
    assert "\x1b" in screen.getvalue() and "loading" in screen.getvalue()


def test_notes_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]/path[0]/:smile: " + "x" * 200
    Terminal().note(text)
    assert capsys.readouterr().err == text + "\n"


def test_phases_may_overlap_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with terminal.phase("loading") as first:
        with terminal.phase("programs") as second:
            first(1, 2)
            second(1, 2)
        assert terminal._bars is not None
    assert terminal._bars is None
    assert all(name in screen.getvalue() for name in ("loading", "programs"))
