"""Kernels interpreted with race detection only print what they find; here it fails the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # at the end, so that it can shadow nothing


@pytest.fixture(autouse=True)
def no_races(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """test_race_detector.py keeps an eye on the words."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
