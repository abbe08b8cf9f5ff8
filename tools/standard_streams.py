"""Standard input and output. A shell may have closed them (`quire chat <&-`); Python then has None.

Commands ask here before they do anything that takes long.
"""

from __future__ import annotations

import sys
from typing import TextIO

from ..errors import InvalidRequest


def stdin() -> TextIO:
    """Raises InvalidRequest where it is closed."""
    # Other than its type says, it may be None.
    return _opened(sys.stdin, "standard input")


def stdout() -> TextIO:
    """Raises InvalidRequest where it is closed."""
    return _opened(sys.stdout, "standard output")


def _opened(stream: TextIO | None, name: str) -> TextIO:
    if stream is None:
        raise InvalidRequest(f"{name} is closed, must be open")
    return stream
