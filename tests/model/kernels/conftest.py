"""Kernels interpreted with race detection only print what they find; here it fails the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_races(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """test_race_detector.py keeps an eye on the words."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
