"""Lets tests import `scripted`, which lies beside them, and `fake_runner` of the scheduler's."""

from __future__ import annotations

import sys
from pathlib import Path

# At the end, so that they can shadow nothing.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "sched")]
