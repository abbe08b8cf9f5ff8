"""Compiling for devices that are not there needs plugins; in CI their absence is a failure."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

# Read by libtpu when it is loaded: no metadata server is waited for.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from quire.tools.compile_check import why_not


@pytest.fixture(scope="session")
def needs_compiler() -> Callable[[str], None]:
    """Call it with "gpu" or "tpu": skips, in CI fails, where nothing compiles for that."""

    def check(platform: str) -> None:
        reason = why_not(platform)
        if reason is None:
            return
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    return check
