"""Engines whose programs the tests beside this file compile, from config.json files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quire.checkpoints.hf_config import read_config
from quire.model.abstract import AbstractDecoder
from quire.model.config import ModelConfig
from quire.model.ladder import make_ladder
from quire.model.mesh import Mesh
from quire.model.plan import RunnerSpec
from quire.model.programs import Programs

CONFIGS = Path(__file__).parent / "configs"
MAX_LEN = 8192


def config_of(name: str) -> ModelConfig:
    """The model of configs/NAME."""
    return read_config(CONFIGS / name)


def engine(
    config: ModelConfig,
    mesh: Mesh,
    *,
    page_size: int,
    num_pages: int,
    rows: int,
    tokens: int,
    **kernels: Any,
) -> tuple[Programs, RunnerSpec]:
    """The programs of an engine in bfloat16, with the default ladder, and kernels by name."""
    spec = RunnerSpec(
        num_slots=rows,
        num_pages=num_pages,
        page_size=page_size,
        max_pages_per_seq=MAX_LEN // page_size,
        max_model_len=MAX_LEN,
        vocab_size=config.vocab_size,
        ladder=make_ladder(rows, tokens),
    )
    return Programs(AbstractDecoder(config, "bfloat16"), spec, mesh, **kernels), spec
