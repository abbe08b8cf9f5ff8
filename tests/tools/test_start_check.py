"""`start_check`: which model it starts, and what its status says. No engine is started."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from quire.config import EngineConfig
from quire.tools import start_check


def run(
    monkeypatch: pytest.MonkeyPatch, *flags: str, inside: bool = True
) -> tuple[int, list[EngineConfig]]:
    started: list[EngineConfig] = []

    def check(config: EngineConfig) -> dict[str, Any]:
        started.append(config)
        return {"inside": inside}

    monkeypatch.setattr(start_check, "check", check)
    monkeypatch.setattr(sys, "argv", ["start_check", *flags])
    return start_check.main(), started


def test_it_starts_models_whose_numbers_ship(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, [config] = run(
        monkeypatch, "--model", "qwen2.5-1.5b", "--dummy-weights", "--memory", "6GiB"
    )
    assert status == 0 and json.loads(capsys.readouterr().out) == {"inside": True}
    assert config.model.endswith("qwen2.5-1.5b") and config.model != "qwen2.5-1.5b"
    assert config.memory == 6 << 30


def test_its_status_says_whether_the_table_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--model", "demo", inside=False)[0] == 1


def test_a_model_without_weights_must_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, started = run(monkeypatch, "--model", "qwen2.5-1.5b")
    assert status == 1 and not started
    assert "dummy-weights" in capsys.readouterr().err
