"""Engines whose programs the tests beside this file compile: a small model, and real ones."""

from __future__ import annotations

from pathlib import Path

from quire.checkpoints.hf_config import read_config
from quire.model.abstract import AbstractDecoder
from quire.model.config import ModelConfig
from quire.model.ladder import make_ladder
from quire.model.mesh import Mesh
from quire.model.plan import RunnerSpec
from quire.model.programs import Programs

CONFIGS = Path(__file__).parent / "configs"


def config_of(name: str) -> ModelConfig:
    return read_config(CONFIGS / name)


def engine(
    config: ModelConfig,
    mesh: Mesh,
    *,
    page_size: int,
    num_pages: int,
    rows: int = 256,
    tokens: int = 2048,
) -> tuple[Programs, RunnerSpec]:
    """Programs in bfloat16."""
    ladder = make_ladder(rows, tokens)
    spec = RunnerSpec(
        rows, num_pages, page_size, 8192 // page_size, 8192, config.vocab_size, ladder
    )
    return Programs(AbstractDecoder(config, "bfloat16"), spec, mesh), spec
