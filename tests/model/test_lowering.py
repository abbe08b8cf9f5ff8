"""How much Python a start waits for, by counts: what is traced, and what a program holds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from stepping import CONFIG

from quire.model.abstract import AbstractDecoder
from quire.model.decoder import Layer, run_layer
from quire.model.ladder import Bucket, Ladder, Sampler
from quire.model.mesh import default_mesh
from quire.model.plan import RunnerSpec
from quire.model.programs import Programs

LAYERS = 6
DECODE, MIXED = Bucket(2, 2, Sampler.GREEDY), Bucket(16, 4, Sampler.GREEDY)
FULL = replace(MIXED, sampler=Sampler.FULL)
SPEC = RunnerSpec(4, 16, 4, 8, 32, CONFIG.vocab_size, Ladder([FULL, MIXED, DECODE]))


def programs(
    windows: tuple[int | None, ...], attention: str | None = None, writer: str | None = None
) -> Programs:
    config = replace(CONFIG, num_layers=LAYERS, windows=windows)
    decoder = AbstractDecoder(config, "float32")
    return Programs(decoder, SPEC, default_mesh(), attention=attention, writer=writer)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Layer]:
    """Layers, as they are traced."""
    found: list[Layer] = []
    trace = Layer.__call__

    def noted(self: Layer, *args: Any) -> Any:
        found.append(self)
        return trace(self, *args)

    monkeypatch.setattr(Layer, "__call__", noted)
    run_layer.clear_cache()
    return found


@pytest.mark.parametrize(
    ("attention", "writer"),
    [(None, None), ("gpu_interpret", "gpu_interpret"), ("tpu_interpret", "tpu_interpret")],
)
def test_layers_that_are_alike_are_one_function(
    attention: str | None, writer: str | None, traced: list[Layer]
) -> None:
    made = programs((None,) * LAYERS, attention, writer)
    text = made.lower(MIXED).as_text()
    assert len(traced) == 1
    assert len(re.findall(r"func\.func private @run_layer\w*\(", text)) == 1
    assert len(re.findall(r"call @run_layer\w*\(", text)) == LAYERS


def test_a_window_makes_another_function(traced: list[Layer]) -> None:
    text = programs((None, 6) * (LAYERS // 2)).lower(DECODE).as_text()
    assert len(traced) == 2
    assert len(re.findall(r"func\.func private @run_layer\w*\(", text)) == 2
    assert len(re.findall(r"call @run_layer\w*\(", text)) == LAYERS


def test_programs_of_as_many_tokens_and_rows_share_the_trace(traced: list[Layer]) -> None:
    made = programs((None,) * LAYERS)
    made.lower(MIXED)
    made.lower(FULL)
    assert len(traced) == 1
    made.lower(DECODE)
    assert len(traced) == 2
