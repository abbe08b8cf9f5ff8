"""`quire bench fairness`: that it asks as it says, as whom it says, and counts right. No figure is
held against a clock."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from quire.errors import InvalidConfig, Unavailable
from quire.serving.auth.key_file import TENANT_LIMITS, read_keys
from quire.tools.bench.fairness import FLOOD, Seen, _write_keys, check_seconds
from quire.tools.bench.load import Served
from quire.tools.cli import main


def served(due: float, first: float, tokens: int = 4, error: str = "") -> Served:
    messages = [] if math.isnan(first) else [(due + first, 1), (due + first + 1, tokens)]
    return Served(due=due, output=4, sent=due, messages=messages, ended=due + 9, error=error)


def test_figures_are_of_those_who_came_after_queues_had_filled() -> None:
    early = [served(at, 100.0) for at in (0.0, 9.9)]
    counted = [served(10.0 + at, at / 100) for at in range(1, 101)]
    refused = [served(50.0, math.nan, error="queue: full"), served(60.0, 0.5, tokens=3)]
    flood = {"sent": 7, "refused": 2, "failed": 0, "tokens": 80}
    found = Seen(20.0, [*early, *counted, *refused], flood).figures(10.0)
    assert (found["requests"], found["failed"]) == (102, 2)
    assert found["ttft_ms"]["p50"] == pytest.approx(500, rel=0.02)
    assert found["ttft_ms"]["p95"] == pytest.approx(950, rel=0.02)
    assert found["tok_s"] == (102 * 4 + 3) / 20 and found["flood"] == {**flood, "tok_s": 4.0}
    assert found["all_tok_s"] == found["tok_s"] + 4.0


@pytest.mark.parametrize(
    ("requests", "why"),
    [([served(5.0, 1.0)], "raise --seconds"), ([served(15.0, math.nan, error="gone")], "gone")],
)
def test_nothing_to_count_is_said(requests: list[Served], why: str) -> None:
    with pytest.raises(Unavailable, match=why):
        Seen(20.0, requests, {"tokens": 0}).figures(10.0)


def test_a_run_that_ends_before_queues_fill_is_refused_at_once() -> None:
    check_seconds(40, 10.0)
    with pytest.raises(InvalidConfig, match=r"^seconds: got 39, must be at least 40: .* 10\.0 s"):
        check_seconds(39, 10.0)


def test_each_tenant_has_a_key_of_its_own_and_no_limits(tmp_path: Path) -> None:
    names = ["tenant 1", "tenant 2", FLOOD]
    keys = _write_keys(tmp_path / "keys.yaml", names)
    table = read_keys(tmp_path / "keys.yaml")
    found = [table.find(keys[name]) for name in names]
    assert [key and key.tenant for key in found] == names
    assert set(table.tenants.values()) == {TENANT_LIMITS}


def test_a_whole_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "fairness.svg"
    sizes = ["--slots=2", "--output=8", "--prompt=4", "--seconds=3", "--times=4", "--tenants=3"]
    main(["bench", "fairness", "--paced", "--json", f"--plot={plot}", *sizes])
    said = capsys.readouterr()
    found, runs = json.loads(said.out), json.loads(said.out)["runs"]
    assert [run["times"] for run in runs] == [1, 4]
    assert [run["failed"] for run in runs] == [0, 0]
    assert runs[0]["requests"] == runs[1]["requests"]  # the same arrivals
    assert runs[1]["flood"]["sent"] > runs[0]["flood"]["sent"] > 0
    assert runs[1]["flood"]["failed"] == 0 and runs[1]["flood"]["tokens"] > 0
    assert found["share_req_s"] == pytest.approx(0.9 * found["capacity_req_s"] / 3)
    asked = found["share_req_s"] * 3 * 8
    assert found["load_of_given"] == pytest.approx(asked / runs[1]["all_tok_s"])
    assert all(set(run["cores"]) == {"engine", "frontend", "callers"} for run in runs)
    before, after = (run["ttft_ms"]["p95"] for run in runs)
    assert found["p95_growth"] == after / before - 1
    assert "4 x its share" in said.err and plot.stat().st_size
