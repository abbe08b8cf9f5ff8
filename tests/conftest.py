"""The environment of every test process: set before anything imports JAX, inherited by children."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "xla-tests"

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    # Compiled programs are kept between runs and shared by xdist's workers, however small they are.
    "JAX_COMPILATION_CACHE_DIR": str(_CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Workers share the cores; a BLAS that takes all of them per worker only waits for itself.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # XLA's threads on a CPU. Interpreted GPU kernels wait for one another in them, and on two cores
    # there would be none left to wait for.
    "NPROC": "8",
    # Tests start child interpreters; the root must not come first on their path (sched).
    "PYTHONSAFEPATH": "1",
}.items():
    os.environ.setdefault(_name, _value)


# Tests that have transformers write their checkpoints; there is not a torch for every interpreter.
_NEEDS_TORCH = Path(__file__).parent / "checkpoints"
_HAS_TORCH = find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path == _NEEDS_TORCH and not _HAS_TORCH else None


def pytest_report_header() -> list[str]:
    left_out = "no torch: tests/checkpoints is left out, parity runs on what is in .cache/zoo"
    return [] if _HAS_TORCH else [left_out]
