"""The tool that times ways to multiply: what it can be seen to do without a GPU."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from quire.model.kernels.gemm_gpu import GemmShape, gemm
from quire.model.kernels.gemv_gpu import GemvShape, gemv
from quire.tools import tune_products

Figures = list[dict[str, object]]


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Figures]:
    small = {True: [GemvShape(rows=2)], False: [GemmShape(rows=16, block=32, programs=4)]}

    def run(*flags: str) -> Figures:
        out = tmp_path / "out.json"
        monkeypatch.setattr(tune_products, "CANDIDATES", small)
        monkeypatch.setattr(tune_products, "LAYERS", 1)
        monkeypatch.setattr(tune_products, "MODELS", {"m": tune_products.Model(64, 96, 64, 80, 90)})
        monkeypatch.setattr(sys, "argv", ["tune_products", "--out", str(out), *flags])
        assert tune_products.main() == 0
        return json.loads(out.read_text())

    return run


def test_every_candidate_compiles_for_a_device_that_is_not_here(
    figures: Callable[..., Figures], needs_compiler: Callable[[str], None]
) -> None:
    needs_compiler("gpu")
    found = figures("--compile-only", "--tokens=1,8")
    assert [f["tokens"] for f in found] == [1] * 6 + [8] * 6
    assert [f["product"] for f in found[:6]] == ["", *tune_products.PRODUCTS]
    assert all("compile_seconds" in f for f in found)


def test_each_candidate_replaces_one_product_and_one_failure_is_not_all(
    figures: Callable[..., Figures],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tune_products, "gemv", partial(gemv, interpret=True))
    monkeypatch.setattr(tune_products, "gemm", partial(gemm, interpret=True))
    found = figures("--tokens=2,8")
    assert len(found) == 12 and all("failed" not in f for f in found)
    for f in found:
        assert all(0 < e < 0.02 for e in f["errors"])  # type: ignore[attr-defined]
    assert "best:" in capsys.readouterr().out

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr(tune_products, "microseconds", broken)
    assert {f["failed"] for f in figures("--tokens=2")} == {"RuntimeError: no such device"}


def test_products_are_timed_as_an_engine_compiles_them_when_all_are_compiled(
    figures: Callable[..., Figures], monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA times candidates of its own on the device while it compiles, which would be in the
    figures; and an engine's products of many tokens are the vendor's."""
    said: list[str] = []
    given: list[int] = []
    monkeypatch.setattr(tune_products, "gemm", partial(gemm, interpret=True))

    def options(_: str, tokens: int) -> dict[str, object]:
        given.append(tokens)
        return {}

    timed = threading.Event()

    def microseconds(*_: object) -> float:
        said.append("timed")
        timed.set()
        return 1.0

    class Slow(ThreadPoolExecutor):
        def submit(self, run: Any, *args: Any, **kwargs: Any) -> Any:
            last = len(given) == 6

            def late() -> Any:
                if last:  # ends after the first figure, if that does not wait for it
                    timed.wait(4)
                done = run(*args, **kwargs)
                said.append("compiled")
                return done

            return super().submit(late)

    monkeypatch.setattr(tune_products, "compiler_options", options)
    monkeypatch.setattr(tune_products, "ThreadPoolExecutor", Slow)
    monkeypatch.setattr(tune_products, "microseconds", microseconds)
    figures("--tokens=8")
    assert said == ["compiled"] * 6 + ["timed"] * 6
    assert given == [8] * 6


def test_a_candidate_that_cannot_be_lowered_fails_alone(
    figures: Callable[..., Figures], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gemv(*_: object, **__: object) -> None:
        raise NotImplementedError("no such product")

    monkeypatch.setattr(tune_products, "gemv", gemv)
    first, *others = figures("--tokens=1")
    assert "us" in first and len(others) == 5
    assert {f["failed"] for f in others} == {"NotImplementedError: no such product"}
