"""Lets tests import `tiny_checkpoint` from the folder above."""

from __future__ import annotations

import sys
from pathlib import Path

# At the end, so that it can shadow nothing.
sys.path.append(str(Path(__file__).parents[1]))
