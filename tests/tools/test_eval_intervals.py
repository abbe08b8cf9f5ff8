"""The formulas of tools/eval/intervals.py, against NumPy and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from quire.tools.eval.intervals import (
    Z95,
    Estimate,
    paired_shares,
    per_token,
    share,
    unpaired_shares,
    z_of,
)


def test_z() -> None:
    assert pytest.approx(1.959964, abs=1e-6) == Z95
    assert z_of(0.95, 10) == pytest.approx(2.807034, abs=1e-6)  # 0.5 % left, on both sides


@pytest.mark.parametrize(("right", "n"), [(0, 20), (20, 20), (1, 3), (190, 200), (77, 200)])
def test_the_ends_of_wilsons_interval_are_where_the_normal_test_would_doubt(
    right: int, n: int
) -> None:
    p = right / n
    found = share(right, n)
    # |p - x| = z sqrt(x (1 - x) / n), squared: a quadratic in x.
    ends = np.sort(np.roots([1 + Z95**2 / n, -2 * p - Z95**2 / n, p * p]).real)
    np.testing.assert_allclose([found.low, found.high], ends, atol=1e-12)
    assert 0 <= found.low <= found.value == p <= found.high <= 1


def draw_groups(rng: np.random.Generator, tasks: int = 3, n: int = 40) -> list[list]:
    """Conversations of tasks that lie far apart; long ones have surer tokens."""
    groups = []
    for at in range(tasks):
        counts = rng.integers(1, 30, n)
        sums = counts * (at + rng.gamma(2.0, 0.5, n)) / np.sqrt(counts)
        groups.append([(float(s), int(c)) for s, c in zip(sums, counts, strict=True)])
    return groups


def test_one_task_per_token_is_the_textbooks_ratio_estimate() -> None:
    (group,) = draw_groups(np.random.default_rng(1), tasks=1)
    sums, counts = np.array(group).T
    rate = sums.sum() / counts.sum()
    rest = sums - rate * counts
    se = np.sqrt(np.var(rest, ddof=1) * len(rest)) / counts.sum()
    np.testing.assert_allclose(per_token([group]), [rate, rate - Z95 * se, rate + Z95 * se])


def test_per_token_agrees_with_a_bootstrap_of_conversations_within_tasks() -> None:
    rng = np.random.default_rng(2)
    groups = draw_groups(rng)
    rates = []
    arrays = [np.array(group) for group in groups]
    for _ in range(4000):
        parts = [a[rng.integers(0, len(a), len(a))] for a in arrays]
        sums, counts = np.concatenate(parts).T
        rates.append(sums.sum() / counts.sum())
    found = per_token(groups)
    assert (found.high - found.low) / 2 / Z95 == pytest.approx(np.std(rates), rel=0.08)
    pooled = per_token([[pair for group in groups for pair in group]])
    assert pooled.high - pooled.low > 1.2 * (found.high - found.low)  # tasks lie apart


def test_a_task_with_one_conversation_counts_too() -> None:
    found = per_token([[(1.0, 1)], [(6.0, 2)]])
    assert found.value == pytest.approx(7 / 3)
    rest = np.array([1 - 7 / 3, 6 - 14 / 3])
    assert found.high - found.value == pytest.approx(Z95 * np.sqrt((rest**2).sum()) / 3)


def test_a_single_conversation_bounds_nothing() -> None:
    found = per_token([[], [(6.0, 2)]])
    assert (found.value, found.low, found.high) == (3.0, -np.inf, np.inf)
    assert found.ci == [None, None]


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    n, p, lost, gained = 100, 0.9, 0.06, 0.03
    hits = {"share": 0, "paired": 0, "unpaired": 0}
    rounds = 2000
    for right, others in zip(
        rng.binomial(n, p, rounds), rng.binomial(n, p - 0.1, rounds), strict=True
    ):
        low_high = share(int(right), n)
        hits["share"] += low_high.low <= p <= low_high.high
        change = unpaired_shares((others / n, n), (right / n, n), Z95)
        hits["unpaired"] += change.low <= 0.1 <= change.high
    for down, up, _ in rng.multinomial(n, [lost, gained, 1 - lost - gained], rounds):
        change = paired_shares(int(down), int(up), n)
        hits["paired"] += change.low <= gained - lost <= change.high
    assert all(0.93 < count / rounds < 0.98 for count in hits.values()), hits


def test_nothing_changed_is_no_change_at_all() -> None:
    assert paired_shares(0, 0, 200) == Estimate(
        0, pytest.approx(-0.0137, abs=1e-4), -paired_shares(0, 0, 200).low
    )
    changed = paired_shares(9, 0, 200)
    assert changed.value == -0.045 and changed.high < 0
