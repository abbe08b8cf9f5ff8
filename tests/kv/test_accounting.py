"""Meters against numbers worked out by hand."""

import pytest

from quire.kv.accounting import RECOMPUTE_WINDOW, PrefixCounters, RecomputeMeter, WasteMeter


def test_waste_is_weighted_by_time() -> None:
    now = [10.0]
    meter = WasteMeter(lambda: now[0])
    assert meter.waste == 0.0
    meter.observe(used=24, allocated=32)  # for 1 s
    now[0] = 11.0
    meter.observe(used=64, allocated=64)  # for 3 s
    now[0] = 14.0
    meter.observe(used=0, allocated=0)  # idle: counts for nothing, however long
    now[0] = 99.0
    # 1 - (24·1 + 64·3) / (32·1 + 64·3)
    assert meter.waste == pytest.approx(1 - 216 / 224)


def test_waste_includes_the_present() -> None:
    now = [0.0]
    meter = WasteMeter(lambda: now[0])
    meter.observe(used=1, allocated=4)
    now[0] = 5.0
    assert meter.waste == pytest.approx(0.75)


def test_prefix_counters_add_up() -> None:
    counters = PrefixCounters()
    counters.count(10, 4)
    counters.count(6, 0)
    assert (counters.queried_tokens, counters.hit_tokens) == (16, 4)


def test_recompute_ratio_is_of_the_recent_past() -> None:
    meter = RecomputeMeter()
    assert meter.ratio == 0.0
    meter.count(100, 10)
    assert meter.ratio == pytest.approx(0.1)
    for _ in range(20):
        meter.count(RECOMPUTE_WINDOW // 2, 0)
    assert meter.ratio < 1e-4
    meter.count(0, RECOMPUTE_WINDOW // 2)
    assert meter.ratio > 0.3  # although it is little against all there ever was
    assert meter.recomputed == 10 + RECOMPUTE_WINDOW // 2
