"""What `quire bench profile` makes of a trace: the traces themselves need a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace as Of
from typing import Any

import pytest
from jax.profiler import ProfileData

from quire.errors import InvalidConfig
from quire.model.abstract import AbstractDecoder
from quire.model.config import ModelConfig, RopeConfig
from quire.model.ladder import make_ladder
from quire.model.mesh import default_mesh
from quire.model.plan import Bucket, RunnerSpec, Sampler
from quire.model.programs import ADMIT, Programs, forward_key, module_name
from quire.serving.progress import Silent
from quire.tools.bench import profile
from quire.tools.bench.kernel_trace import Kernel, kernels, programs, summary
from quire.tools.cli import main


def event(name: str, begin_us: float, us: float, program: str = "") -> Of:
    stats = [("correlation_id", 3), ("hlo_module", f"jit_{program}")] if program else []
    return Of(name=name, start_ns=1e3 * begin_us, duration_ns=1e3 * us, stats=stats)


def test_only_kernels_on_streams_of_gpus_count() -> None:
    lines = [
        Of(name="Stream #14", events=[event("gemm_1", 500, 100), event("MemcpyD2H", 0, 9)]),
        Of(name="XLA Ops", events=[event("fusion", 0, 1)]),
        Of(name="Stream #2", events=[event("add", 100, 100, "admit")]),
    ]
    cpu = Of(name="/host:CPU", lines=[Of(name="Stream", events=[event("x", 0, 1)])])
    profile = Of(planes=[cpu, Of(name="/device:GPU:0", lines=lines)])
    assert kernels(profile) == [
        ("add", 0.1, pytest.approx(0.2), "admit"),
        ("gemm_1", 0.5, 0.6, ""),
    ]


def test_busy_is_the_union_of_what_overlaps() -> None:
    times = [("a_1", 0.0, 4.0), ("a_2", 2.0, 6.0), ("b", 3.0, 4.0), ("b.7", 8.0, 10.0)]
    found = [Kernel(*each) for each in times]
    got = summary(found, 0.0, 2)
    assert got["busy"] == pytest.approx(0.8) and got["launches"] == 2
    assert got["ms_per_step"] == pytest.approx(5)
    assert got["kernels"] == {
        "a": {"ms": pytest.approx(4), "count": 1},
        "b": {"ms": pytest.approx(1.5), "count": 1},
    }


def test_a_part_leaves_out_what_began_before_it() -> None:
    found = [Kernel("a", 0.0, 6.0), Kernel("b", 6.0, 8.0), Kernel("b", 9.0, 10.0)]
    got = summary(found, 0.5, 1)
    assert list(got["kernels"]) == ["b"] and got["busy"] == pytest.approx(0.75)
    assert summary([], 0.0, 1)["busy"] is None


def test_kernels_are_told_apart_by_their_step_program() -> None:
    """By the name that the program has, sampled or not; what is no step counts in all."""
    whole, apart = Bucket(64, 64, Sampler.GREEDY), Bucket(64, 64, Sampler.SAMPLE)
    found = [
        Kernel("gemm_1", 0.0, 2.0, "step_64x64_greedy"),
        Kernel("gemm_1", 2.0, 4.0, "step_64x64_greedy"),
        Kernel("attention_tile_merge", 4.0, 5.0, "step_64x64_greedy"),
        Kernel("nvjet_x", 5.0, 8.0, "forward_64x64"),
        Kernel("sort", 8.0, 9.0, "sample_64_sample"),
        Kernel("add", 9.0, 9.5),
    ]
    steps = {
        whole: {"count": 2, "median_ms": 3.0, "sum_ms": 6.0},
        apart: {"count": 1, "median_ms": 4.0, "sum_ms": 4.0},
    }
    got = programs(found, steps)
    assert [*got] == [
        "64 tokens x 64 rows, greedy",
        "64 tokens x 64 rows, sample",
        "programs that the profiler did not name",
        "sample_64_sample",
    ]
    first, second, unknown, sample = got.values()
    assert (first["steps"], first["step_ms"], first["kernels_ms"]) == (2, 3.0, 2.5)
    assert first["kernels"]["gemm"] == {"ms": 2.0, "count": 1.0}
    assert second["kernels_ms"] == 3.0 and unknown["kernels_ms"] == 0.5
    assert sample["steps"] is None and sample["kernels_ms"] == 1.0
    made = profile._programs_table("mixed", {"programs": got})
    cells = {str(column.header): list(column.cells) for column in made.columns}
    assert cells["products"] == ["2.000", "3.000", "0.000", "0.000"]
    assert cells["prompts"] == ["0.500", "0.000", "0.000", "0.000"]


def test_a_program_is_called_by_its_rung() -> None:
    ladder = make_ladder(16, 64, max_k=4)
    names = {module_name(forward_key(bucket)) for bucket in ladder.buckets}
    whole = sum(not bucket.apart for bucket in ladder.buckets)
    assert len(names) == whole + len(ladder.forwards)
    assert {"step_8x8_greedy", "step_8x8_greedy_k4", "forward_64x16"} < names
    config = ModelConfig(
        family="llama", vocab_size=61, hidden_size=16, intermediate_size=24, num_layers=1,
        num_heads=2, num_kv_heads=1, head_dim=8, norm_eps=1e-6, rope=RopeConfig(),
        windows=(None,), max_positions=64,
    )  # fmt: skip
    spec = RunnerSpec(16, 17, 4, 8, 32, config.vocab_size, ladder)
    made = Programs(AbstractDecoder(config, "float32"), spec, default_mesh())
    for key in (Bucket(8, 8, Sampler.GREEDY), ADMIT):
        assert f"module @jit_{module_name(key)} " in made.lower(key).as_text()


def test_what_the_profiler_writes_is_read() -> None:
    text = """planes {
      name: "/device:GPU:0"
      event_metadata { key: 1 value { id: 1 name: "gemm_1" } }
      stat_metadata { key: 5 value { id: 5 name: "hlo_module" } }
      stat_metadata { key: 6 value { id: 6 name: "jit_step_8x8_greedy" } }
      stat_metadata { key: 7 value { id: 7 name: "correlation_id" } }
      lines { name: "Stream #14" timestamp_ns: 1000000 events {
        metadata_id: 1 offset_ps: 5000000 duration_ps: 2000000
        stats { metadata_id: 7 uint64_value: 12 } stats { metadata_id: 5 ref_value: 6 }
      } }
    }"""
    (kernel,) = kernels(ProfileData.from_text_proto(text))
    assert kernel == ("gemm_1", pytest.approx(1.005), pytest.approx(1.007), "step_8x8_greedy")


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
    args: Any = Of(batch=(16, 17), prompt_tokens=(599, 600), mixed=(120, 3), keep=None)
    found, left_out = profile._profile(engine, args, Silent())
    assert found == {"decode 16": 16, "first 599": 1, "hit 599": 1, "mixed 120": 120, "mixed 3": 3}
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
