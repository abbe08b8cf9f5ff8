"""Lets tests import `zoo` and `harness`, which lie beside them."""

import sys
from pathlib import Path

# At the end, so that they can shadow nothing.
sys.path.append(str(Path(__file__).parent))
