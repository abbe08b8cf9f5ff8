"""Compiling for devices that are not there needs plugins; in CI their absence is a failure."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Lets the tests import `described_engines`; at the end, so that it can shadow nothing.
sys.path.append(str(Path(__file__).parent))
# Read by libtpu when it is loaded: no metadata server is waited for.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Likewise: several test processes may load it, since none of them takes a device.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

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
