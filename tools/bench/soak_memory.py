"""How the memory of a server's processes went during a soak. Used by soak.py.

A long prompt takes much for a moment and gives it back; a leak raises also what is held between
such moments. So a run is cut into windows, and growth is of their lows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

WINDOWS = 20
"""Of a run."""

SETTLED_AFTER = 0.2
"""Share of a run after which growth counts: pools, caches and heaps have filled by then."""

Sample = tuple[float, int]
"""Seconds after the run began, bytes."""


class Window(NamedTuple):
    """Seconds after the run began at which memory was lowest, and bytes."""

    at: float
    low: int
    high: int


def windows(samples: Sequence[Sample]) -> list[Window]:
    """The windows of a run that has ended, each that has samples."""
    found: dict[int, list[Sample]] = {}
    end = samples[-1][0] if samples else 0.0
    for sample in samples:
        number = min(int(sample[0] / end * WINDOWS), WINDOWS - 1) if end else 0
        found.setdefault(number, []).append(sample)
    made = []
    for part in found.values():
        at, low = min(part, key=lambda sample: sample[1])
        made.append(Window(at, low, max(size for _, size in part)))
    return made


def growth(samples: Sequence[Sample]) -> float:
    """Bytes a minute after things have settled: the median slope between the lows of windows."""
    import numpy as np

    first = SETTLED_AFTER * samples[-1][0] if samples else 0.0
    settled = [window for window in windows(samples) if window.at >= first]
    slopes = [
        (later.low - earlier.low) / (later.at - earlier.at)
        for earlier, later in combinations(settled, 2)
    ]
    return 60 * float(np.median(slopes)) if slopes else 0.0
