"""Lets tests import `tiny_checkpoint` from the folder above, and helpers from this one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# At the end, so that it can shadow nothing.
sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint."""
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny"))
