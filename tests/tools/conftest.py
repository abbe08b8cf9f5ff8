"""Lets tests import `tiny_checkpoint` from the folder above, and helpers from this one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# At the end, so that it can shadow nothing.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def collector() -> Iterator[None]:
    """Benchmarks settle the garbage collector of their process, which here is the tests'."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)
