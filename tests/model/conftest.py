"""Lets tests import `stepping`, which lies beside them."""

import sys
from pathlib import Path

# At the end, so that it can shadow nothing.
sys.path.append(str(Path(__file__).parent))
