"""What `quire bench profile` makes of a trace: the traces themselves need a GPU."""

from __future__ import annotations

from types import SimpleNamespace as Of

import pytest

from quire.tools.bench.profile import kernels, summary


def event(name: str, begin_us: float, us: float) -> Of:
    return Of(name=name, start_ns=1e3 * begin_us, duration_ns=1e3 * us)


def test_only_kernels_on_streams_of_gpus_count() -> None:
    lines = [
        Of(name="Stream #14", events=[event("gemm_1", 500, 100), event("MemcpyD2H", 0, 9)]),
        Of(name="XLA Ops", events=[event("fusion", 0, 1)]),
        Of(name="Stream #2", events=[event("add", 100, 100)]),
    ]
    cpu = Of(name="/host:CPU", lines=[Of(name="Stream", events=[event("x", 0, 1)])])
    profile = Of(planes=[cpu, Of(name="/device:GPU:0", lines=lines)])
    assert kernels(profile) == [("add", 0.1, pytest.approx(0.2)), ("gemm_1", 0.5, 0.6)]


def test_busy_is_the_union_of_what_overlaps() -> None:
    found = [("a_1", 0.0, 4.0), ("a_2", 2.0, 6.0), ("b", 3.0, 4.0), ("b.7", 8.0, 10.0)]
    got = summary(found, 0.0, 2)
    assert got["busy"] == pytest.approx(0.8) and got["launches"] == 2
    assert got["ms_per_step"] == pytest.approx(5)
    assert got["kernels"] == {
        "a": {"ms": pytest.approx(4), "count": 1},
        "b": {"ms": pytest.approx(1.5), "count": 1},
    }


def test_a_part_leaves_out_what_began_before_it() -> None:
    found = [("a", 0.0, 6.0), ("b", 6.0, 8.0), ("b", 9.0, 10.0)]
    got = summary(found, 0.5, 1)
    assert list(got["kernels"]) == ["b"] and got["busy"] == pytest.approx(0.75)
    assert summary([], 0.0, 1)["busy"] is None
