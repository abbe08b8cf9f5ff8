"""What `quire bench profile` makes of a trace: the traces themselves need a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Of
from typing import Any

import pytest

from quire.errors import InvalidConfig
from quire.serving.progress import Silent
from quire.tools.bench import profile
from quire.tools.bench.profile import kernels, summary
from quire.tools.cli import main


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


def test_of_several_gpus_one_is_read() -> None:
    """Together they would look busy while each waits for the other."""

    def gpu(at: int, *events: Of) -> Of:
        return Of(name=f"/device:GPU:{at}", lines=[Of(name="Stream #1", events=[*events])])

    planes = [gpu(2, event("c", 5, 5)), gpu(1, event("a", 0, 5)), gpu(0)]
    assert [name for name, *_ in kernels(Of(planes=planes))] == ["a"]
    assert kernels(Of(planes=[gpu(0)])) == []


def test_only_a_gpu_can_be_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "profile", f"--model={folder}"]) == 1
    assert "platform: got cpu, must be gpu" in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfig, match="--keep: got"):
        profile._make(tmp_path / "file")


def test_what_an_engine_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than run at once would not all be decoding together."""
    engine: Any = Of(
        parts=Of(sizes=Of(spec=Of(num_slots=16))),
        longest=600,
        vocab=512,
        run=lambda prompts, outputs: None,
    )
    monkeypatch.setattr(profile, "_traced", lambda engine, prompts, outputs, *_: len(prompts))
    args: Any = Of(batch=(16, 17), prompt_tokens=(599, 600), keep=None)
    found, left_out = profile._profile(engine, args, Silent())
    assert found == {"decode 16": 16, "first 599": 1, "hit 599": 1, "mixed": 120}
    assert left_out == [
        "decode 17: the engine runs 16 requests at once",
        "first 600: the engine's limit is 600 tokens",
        "hit 600: the engine's limit is 600 tokens",
    ]


def test_a_picture_says_which_kernel_is_which() -> None:
    from matplotlib.figure import Figure

    kinds = {f"k{at}": {"ms": 20.0 - at, "count": 1.0} for at in range(profile.SHOWN + 2)}
    figure = Figure()
    scenarios = {"decode 1": {"kernels": kinds}, "mixed": {"kernels": {"k0": kinds["k0"]}}}
    profile._draw(figure, {"settings": {"model": "m"}, "scenarios": scenarios})
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == [f"k{at}" for at in range(profile.SHOWN)] + ["others"]
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]  # type: ignore[union-attr]
    assert widths[0] == [20.0, 20.0] and widths[-1] == [20.0 - 12 + 20.0 - 13, 0]
