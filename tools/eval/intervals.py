"""How sure a measured figure is: the formulas behind every interval that `quire eval` shows.

Pure arithmetic on counts and sums. An interval at `z` covers the truth as often as a normal
variable lies within z standard deviations: `Z95` is 95 of 100 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, inf, isfinite, sqrt
from statistics import NormalDist
from typing import NamedTuple


class Estimate(NamedTuple):
    """A figure and the interval around it."""

    value: float
    low: float
    high: float

    @property
    def ci(self) -> list[float | None]:
        """The interval as JSON has it: null where there is no bound."""
        return [round(bound, 6) if isfinite(bound) else None for bound in (self.low, self.high)]


def z_of(confidence: float, comparisons: int = 1) -> float:
    """The z at which so many intervals cover the truth all at once with this confidence."""
    return NormalDist().inv_cdf(1 - (1 - confidence) / (2 * comparisons))


Z95 = z_of(0.95)


def share(right: int, n: int, z: float = Z95) -> Estimate:
    """`right` of `n` (n > 0), with Wilson's interval: it keeps its promise near 0 and 1 too."""
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends, where they are exact, rounding would leave the figure outside.
    return Estimate(p, max(min(p, centre - half), 0.0), min(max(p, centre + half), 1.0))


def per_token(groups: Sequence[Sequence[tuple[float, int]]], z: float = Z95) -> Estimate:
    """The sum of all sums over the number of all tokens.

    Tokens of one conversation stand and fall together, so conversations are what was sampled
    (cluster-robust, by linearization), and they were sampled task by task (strata): how far tasks
    lie apart says nothing about how sure the figure is.

    Args:
      groups: for each task, (sum over its tokens, number of them) of each conversation; at least
        one token in all. A task with a single conversation counts with its distance from the whole;
        a single conversation in all says nothing of how far others lie from it: no bounds.
    """
    tokens = sum(count for group in groups for _, count in group)
    rate = fsum(total for group in groups for total, _ in group) / tokens
    if sum(map(len, groups)) == 1:
        return Estimate(rate, -inf, inf)
    variance = 0.0
    for group in groups:
        rest = [total - rate * count for total, count in group]
        n = len(rest)
        mean = fsum(rest) / n if n > 1 else 0.0
        variance += n / max(n - 1, 1) * fsum((r - mean) ** 2 for r in rest)
    half = z * sqrt(variance) / tokens
    return Estimate(rate, rate - half, rate + half)


def paired_shares(lost: int, gained: int, n: int, z: float = Z95) -> Estimate:
    """How a share changed on the same `n` examples, of which `lost` were right only before and
    `gained` only after; with Bonett and Price's interval (Wald's with one added to each)."""
    before, after, count = (lost + 1) / (n + 2), (gained + 1) / (n + 2), n + 2
    centre = after - before
    half = z * sqrt((before + after - centre**2) / count)
    return Estimate((gained - lost) / n, max(centre - half, -1.0), min(centre + half, 1.0))


def unpaired_shares(before: tuple[float, int], after: tuple[float, int], z: float) -> Estimate:
    """How a share changed between different examples, with Newcombe's interval.

    Args:
      before, after: (share, number of examples).
    """
    old, new = (share(round(p * n), n, z) for p, n in (before, after))
    change = new.value - old.value
    low = change - sqrt((new.value - new.low) ** 2 + (old.high - old.value) ** 2)
    high = change + sqrt((new.high - new.value) ** 2 + (old.value - old.low) ** 2)
    return Estimate(change, low, high)
