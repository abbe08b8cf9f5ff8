"""The tool that times the GPU's attention kernels: what it can be seen to do without a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quire.model.kernels.attention import gpu
from quire.model.kernels.attention.gpu_decode import DecodeShape
from quire.model.kernels.attention.gpu_mosaic import MosaicShape
from quire.model.kernels.attention.gpu_prefill import PrefillShape
from quire.tools import tune_kernels
from quire.tools.bench.kernel_cases import Case

SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 32}
SHAPES = {
    "decode": [DecodeShape()],
    "prefill": [PrefillShape(queries=32, block=32, num_warps=4, num_stages=2, least_blocks=2)],
}


@pytest.fixture
def figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, object]]]:
    def run(*flags: str) -> list[dict[str, object]]:
        out = tmp_path / "out.json"
        monkeypatch.setattr(tune_kernels, "CANDIDATES", SHAPES)
        monkeypatch.setattr(sys, "argv", ["tune_kernels", "--out", str(out), *flags])
        assert tune_kernels.main() == 0
        return json.loads(out.read_text())

    return run


def test_every_candidate_compiles_for_a_device_that_is_not_here(
    figures: Callable[..., list[dict[str, object]]], needs_compiler: Callable[[str], None]
) -> None:
    needs_compiler("gpu")
    found = figures("--compile-only")
    assert [f["kind"] for f in found] == ["prefill", "decode"]
    assert all("compile_seconds" in f for f in found)


def test_errors_are_those_of_the_first_call_and_one_failure_is_not_all(
    figures: Callable[..., list[dict[str, object]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = {
        "decode": [Case(rows=3, context=70, **SIZES)],
        "prefill": [Case(rows=1, context=200, queries=9, **SIZES)],
    }
    monkeypatch.setattr(tune_kernels, "CASES", cases)
    monkeypatch.setattr(tune_kernels, "LAYERS", 2)
    monkeypatch.setattr(tune_kernels, "MAX_PAGES", 16)
    monkeypatch.setattr(tune_kernels, "attend", gpu.attend_interpreted)
    monkeypatch.setitem(SHAPES, "prefill", [MosaicShape(), *SHAPES["prefill"]])
    found = figures("--kinds", "decode,prefill")
    assert [f["kernel"] for f in found] == ["triton", "mosaic", "triton"]
    # A head dim of 32: refused before anything is compiled.
    assert str(found.pop(1)["failed"]).startswith("NotImplementedError: prefill by Mosaic")
    assert [f["kind"] for f in found] == ["decode", "prefill"]
    for figure in found:
        assert 0 < float(str(figure["error"])) < 0.01 and float(str(figure["us"])) > 0
    assert "best of each case" in capsys.readouterr().out

    def broken(*_: object) -> float:
        raise RuntimeError("no such device")

    monkeypatch.setattr(tune_kernels, "microseconds", broken)
    [figure] = figures("--kinds", "decode")
    assert figure["failed"] == "RuntimeError: no such device"
