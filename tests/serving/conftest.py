"""One tiny model for all tests of the faces. Lets them import `engines`, which lies beside them,
and `tiny_checkpoint` from the folder above."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# At the end, so that they can shadow nothing.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import tiny_checkpoint
from engines import SETTINGS
from running import Running

from quire import LLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Running]:
    with Running(folder) as running:
        yield running.open()
