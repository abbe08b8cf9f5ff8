"""`quire bench`: that it measures what it says. No figure is held against a clock."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from quire.errors import InvalidConfig
from quire.model.kernels.attention import api
from quire.model.memory import PLATFORMS
from quire.model.plan import StepPlan
from quire.sched.request import Request, SamplingParams
from quire.sched.scheduler import Scheduler
from quire.tools.bench import (
    device_limits,
    engine_run,
    kernel_cases,
    kernels,
    latency,
    report,
    startup,
    throughput,
)
from quire.tools.bench.models import DATA, shipped_configs
from quire.tools.bench.null_runner import NullRunner, null_spec
from quire.tools.bench.scheduler import ClosedLoop
from quire.tools.bench.step_clock import Step, StepClock, by_bucket
from quire.tools.bench.trace import Trace, draw_prompts, read_trace
from quire.tools.cli import main

SMALL = ["--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=32", "--page-size=16"]

pytestmark = pytest.mark.usefixtures("collector")

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs a benchmark with --json; what it said."""

    def bench(*argv: object) -> dict[str, Any]:
        assert main(["bench", *map(str, argv), "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return bench


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refused(*argv: object) -> str:
        assert main(["bench", *map(str, argv)]) == 1
        said = capsys.readouterr()
        assert said.out == "" and "Traceback" not in said.err
        return said.err.splitlines()[-1]

    return refused


# Traces and models


def test_the_shipped_trace_is_the_one_the_peers_ran() -> None:
    trace = read_trace("sharegpt-like")
    assert len(trace) == 1000
    assert (sum(trace.prompts), sum(trace.outputs)) == (207_595, 215_747)
    peers = json.loads((DATA / "peers_h200.json").read_text())
    assert "1000 requests, 207,595 prompt tokens, 215,747 output tokens" in peers["trace"]


def test_a_trace_is_fitted_only_when_asked() -> None:
    trace = Trace("t", (10, 90, 5), (5, 20, 200))
    assert trace.fitted(205, clip=False) == trace
    with pytest.raises(InvalidConfig, match=r"request 1 has 90 \+ 20 tokens, must be at most 100"):
        trace.fitted(100, clip=False)
    clipped = trace.fitted(100, clip=True)
    assert (clipped.prompts, clipped.outputs, clipped.clipped) == ((10, 50, 5), (5, 20, 95), 2)
    assert trace.first(1).prompts == (10,)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[[1]]", "[[1, 0]]", "[[1, true]]", "[[1, 2.0]]"])
def test_what_is_no_trace(tmp_path: Path, text: str) -> None:
    file = tmp_path / "trace.json"
    file.write_text(text)
    with pytest.raises(InvalidConfig, match="trace: "):
        read_trace(str(file))


def test_prompts_are_drawn_anew() -> None:
    draw = np.random.default_rng(0)
    first, second = (draw_prompts([50, 3], 300, draw) for _ in range(2))
    assert [len(p) for p in first] == [50, 3] and first != second
    assert all(0 <= t < 300 for p in first for t in p)


def test_models_by_name_need_dummy_weights(refused: Any) -> None:
    assert shipped_configs() == ["llama-3.1-8b", "qwen2.5-1.5b"]
    said = refused("throughput", "--model=llama-3.1-8b")
    assert "only the config.json ships with Quire; add --dummy-weights" in said
    assert "model: got none" in refused("latency")
    said = refused("throughput", "--model=qwen2.5-1.5b", "--dummy-weights", "--max-model-len=99999")
    assert "max_model_len: got 99999, must be at most 32768" in said


# Whole engines


def test_throughput_counts_what_ran(bench: Bench, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("[[20, 5], [3, 4], [40, 1], [9, 9]]")
    plot = tmp_path / "plot.png"
    said = bench(
        "throughput", f"--model={folder}", f"--trace={trace}", "--requests=3", "--repeat=2",
        f"--plot={plot}", f"--steps={tmp_path / 'steps.csv'}", *SMALL,
    )  # fmt: skip
    assert said["trace"]["prompt_tokens"] == 63 and said["trace"]["output_tokens"] == 10
    assert len(said["repetitions"]) == 2
    for figures in said["repetitions"]:
        assert figures["output_tok_s"] == pytest.approx(10 / figures["seconds"])
        assert figures["total_tok_s"] == pytest.approx(73 / figures["seconds"])
        by_bucket = figures["steps_by_bucket"].values()
        assert sum(found["count"] for found in by_bucket) == figures["steps"] >= 5
        assert figures["steps_ms"] == pytest.approx(sum(found["sum_ms"] for found in by_bucket))
        assert 0 < figures["steps_ms"] <= 1e3 * figures["seconds"]  # steps do not overlap
        assert 0 <= figures["padding_waste"] < 1 and figures["prefix_hit_tokens"] == 0
    rates = [figures["output_tok_s"] for figures in said["repetitions"]]
    assert said["output_tok_s"]["best"] == max(rates)
    assert said["settings"]["max_num_seqs"] == 4
    assert said["device"]["platform"] == "cpu" and "jax" in said["versions"]
    assert said["command"].split()[0] == "quire" and said["date"].startswith("20")
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = [*csv.DictReader((tmp_path / "steps.csv").open())]
    assert len(lines) == sum(figures["steps"] for figures in said["repetitions"])
    first = [line for line in lines if line["run"] == "1"]
    assert sum(int(line["tokens"]) for line in first) == 63 + 10 - 3  # the last ones are not read
    assert sum(int(line["decode_rows"]) for line in first) == 10 - 3
    assert sum(int(line["decode_reads"]) for line in first) == sum(range(21, 25)) + sum((4, 5, 6))
    assert (
        sum(int(line["prompt_pairs"]) for line in first) == 20 * 21 // 2 + 3 * 4 // 2 + 40 * 41 // 2
    )


def test_throughput_with_so_many_at_once(bench: Bench, folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("[[2, 5], [3, 4], [4, 1], [9, 9]]")
    said = bench(
        "throughput", f"--model={folder}", f"--trace={trace}", "--repeat=1", "--concurrency=1",
        *SMALL,
    )  # fmt: skip
    (run,) = said["repetitions"]
    assert said["concurrency"] == 1 and run["steps"] == 5 + 4 + 1 + 9


def test_steps_are_timed_from_when_the_device_could_begin() -> None:
    spec = null_spec(4, page_size=4, max_model_len=64, pages=33)
    times = iter((0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 5.5, 6.0, 7.0, 9.0, 10.0, 10.5, 11.0, 12.0))
    runner: Any = NullRunner(spec)
    clock = StepClock(runner, lambda: next(times))
    scheduler = Scheduler(spec, max_batched_tokens=32, prefill_chunk=32)
    sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=9)
    scheduler.submit(Request(id="a", prompt=(1, 2, 3), sampling=sampling))
    plan = scheduler.schedule()
    assert plan is not None
    seen: list[Step] = []
    clock.steps = seen
    lost = runner.launch(plan)  # 1: a fault takes it
    runner.collect(runner.launch(replace(plan)))  # 2, 5
    runner.collect(runner.launch(replace(plan)))  # 6, 9
    clock.steps = None
    runner.launch(plan)
    runner.collect(lost)  # 12, and nobody wants to know
    assert [step.seconds for step in seen] == [3.0, 3.0]
    (figures,) = by_bucket(seen).values()
    assert figures == {"count": 2, "median_ms": 3e3, "sum_ms": 6e3}
    assert [*clock.calls][1:3] == [("launch", 1.5, 2.0), ("collect", 3.0, 5.0)]
    assert len(clock.calls) == 7


def test_latency_by_its_method(bench: Bench, folder: Path) -> None:
    said = bench(
        "latency", f"--model={folder}", "--batch=1,2,99", "--prompt-tokens=8",
        "--output-tokens=20", "--ttft-tokens=8,9999", "--prefix-tokens=40", "--repeat=1", *SMALL,
    )  # fmt: skip
    assert list(said["decode_step_ms"]) == ["1", "2"] and list(said["ttft_ms"]) == ["8"]
    assert len(said["ttft_ms"]["8"]["all"]) == 5
    for parts in (said["ttft_ms"]["8"]["parts"], said["prefix_ms"]["hit_parts"]):
        assert list(parts) == ["before", "launch", "collect", "rest"]
        assert min(parts.values()) > 0
    # Full pages of the prompt, but never its last token.
    assert said["prefix_ms"]["hit_tokens"] == 32 and len(said["prefix_ms"]["all_hits"]) == 5
    assert said["left_out"] == [
        "batch 99: the engine runs 4 requests at once",
        "ttft 9999: needs 10000 tokens, the engine's limit is 4096",
    ]


def test_a_decode_step_is_what_more_tokens_cost() -> None:
    """With 1 s for all prefills and 10 ms for each step, whatever the number of tokens."""
    asked: list[tuple[int, list[int]]] = []

    def run(prompts: list[Any], outputs: list[int], name: str) -> SimpleNamespace:
        asked.append((len({*prompts}), outputs))
        return SimpleNamespace(seconds=1.0 + 0.01 * outputs[0])

    spec = SimpleNamespace(num_slots=4)
    parts = SimpleNamespace(sizes=SimpleNamespace(spec=spec))
    engine: Any = SimpleNamespace(parts=parts, longest=500, vocab=10**6, run=run)
    args = argparse.Namespace(seed=0, prompt_tokens=128, output_tokens=272, repeat=2)
    found = latency._Latency(engine, args).decode(3)
    assert found is not None and found["all"] == pytest.approx([10.0, 10.0])
    assert asked == [(3, [272] * 3), (3, [16] * 3)] * 2


def test_the_floor_is_the_dearer_of_bytes_and_operations() -> None:
    limits = device_limits.Limits(copy_gb_s=4000, matmul_tflop_s=800)
    assert limits.floor_seconds(4e9, 8e11) == pytest.approx(1e-3)
    assert limits.floor_seconds(1e9, 8e11) == pytest.approx(1e-3)
    assert limits.floor_seconds(4e9, 8e9) == pytest.approx(1e-3)


def test_latency_needs_more_tokens_than_it_takes_off(refused: Any, folder: Path) -> None:
    said = refused("latency", f"--model={folder}", "--output-tokens=16")
    assert "output_tokens: got 16, must be at least 17" in said


def test_startup_finds_programs_stored_the_second_time(bench: Bench, folder: Path) -> None:
    said = bench("startup", f"--model={folder}", "--runs=1", "--prompt-tokens=4", *SMALL)
    cold, (warm,) = said["cold"], said["warm"]
    assert cold["programs"]["compiled_by_XLA"] > 0 == warm["programs"]["compiled_by_XLA"]
    for run in (cold, warm):
        assert {"interpreter", "imports", "loading", "first token"} <= set(run["phases"])
        assert all(0 <= seconds < run["seconds"] for seconds in run["phases"].values())
        assert run["ready"] + run["phases"]["first token"] == pytest.approx(run["seconds"])
    assert said["stored_bytes"] > 0 and said["device"]["platform"] == "cpu"


def test_startup_says_why_a_run_failed(refused: Any, folder: Path) -> None:
    said = refused("startup", f"--model={folder}", "--memory=1KiB", *SMALL)
    assert "the cold run failed: memory: got 1,024 bytes" in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["startup", "--prompt-tokens=300"], "prompt_tokens: got 300, must be at most 299: what 1"),
        (["latency", "--prompt-tokens=29"], "prompt_tokens: got 29, must be at most 28: what 272"),
        (["throughput"], "request 0 has 127 + 198 tokens, must be at most 300"),
        (["startup", "--model=nowhere"], "nowhere: does not exist"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_loads(
    refused: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], says: str
) -> None:
    monkeypatch.setattr(startup, "_child", None)  # calling it would be a TypeError
    monkeypatch.setattr(engine_run, "assemble", None)
    assert says in refused(argv[0], f"--model={folder}", "--max-model-len=300", *argv[1:])


# The scheduler alone


def test_scheduler_figures(bench: Bench, tmp_path: Path) -> None:
    said = bench(
        "scheduler", "--rows=8,16", "--steps=30", "--replays=2", f"--plot={tmp_path / 'p.svg'}"
    )
    for rows in ("8", "16"):
        figures = said["rows"][rows]
        assert figures["full"]["steps"] == 30 and figures["budget_p99_ms"] is None
        for part in ("admit", "schedule", "pack", "update"):
            assert figures["full"]["parts_wall_ms"][part]["p99"] > 0
    assert "device" not in said and (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_the_loop_keeps_the_rows_full_and_the_pages_right() -> None:
    trace = Trace("t", (9, 30, 1), (7, 3, 12))
    loop = ClosedLoop(null_spec(6, page_size=4, max_model_len=64, pages=100), trace)
    for _ in range(3):
        loop.run(len(loop.steps.wall) + 20)
        loop.scheduler.check_integrity()
    stats = loop.scheduler.stats()
    assert stats.running == 6 and stats.waiting == 0 and stats.finished > 10
    assert stats.preemptions == 0 and stats.prefix_hit_tokens == 0
    assert len(loop.steps.cpu) == len(loop.steps.parts["pack"]) == 60


def test_the_null_runner_keeps_the_contract() -> None:
    spec = null_spec(4, page_size=4, max_model_len=64, pages=9)
    runner = NullRunner(spec)
    ints = np.array([0, 1, 2], np.int32)
    plan = StepPlan(
        ints, ints, ints, ints, np.array([1, 0, 1], np.int32), 1, spec.ladder.buckets[0]
    )
    outputs = runner.collect(runner.launch(plan))
    assert outputs.n_valid.tolist() == [1, 0, 1] and outputs.tokens.shape == (3, 1)
    assert not outputs.not_finite.any() and (outputs.tokens < spec.vocab_size).all()


# Kernels


CASE = {"rows": 3, "context": 20, "heads": 4, "kv_heads": 2, "head_dim": 8, "page_size": 8}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything once: figures are not what is tested here."""
    monkeypatch.setattr(device_limits, "BEST_OF", 1)
    for name, value in {"LOOP": 1, "LOOK_SECONDS": 0, "WRITE_TOKENS": (1, 9)}.items():
        monkeypatch.setattr(kernels, name, value)


@pytest.mark.usefixtures("hasty")
def test_kernels_with_their_errors(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    def wrong(q: Any, slab: Any, batch: Any, extras: Any, options: Any) -> Any:
        out, lse = api.blockwise.attend(q, slab, batch, extras, options)
        return out.at[:, 0].multiply(1.5), lse

    def broken(*_: Any) -> Any:
        raise NotImplementedError("no such\nshape")

    for name, attend in (("wrong", wrong), ("broken", broken), ("gpu_other", broken)):
        monkeypatch.setitem(api.BACKENDS, name, attend)
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps([{**CASE, "ragged": True}, {**CASE, "queries": 5}]))
    said = bench("kernels", f"--grid={grid}", f"--plot={tmp_path / 'k.png'}")
    assert said["limits"]["copy_gb_s"] > 0 and said["limits"]["matmul_tflop_s"] > 0
    by_backend: dict[str, list[dict[str, Any]]] = {}
    for row in said["attention"]:
        by_backend.setdefault(row["backend"], []).append(row)
    assert "gpu_other" not in by_backend  # of another platform
    for name in ("reference", "blockwise"):
        assert [row["error"] < 1e-5 for row in by_backend[name]] == [True, True]
        assert all(row["us"] > 0 for row in by_backend[name])
    assert all(row["error"] > 0.1 for row in by_backend["wrong"])
    assert by_backend["broken"][0]["failed"] == "NotImplementedError: no such shape"
    assert len(said["kv_write"]) == 2 and all(row["exact"] for row in said["kv_write"])
    assert said["left_out"] == [] and (tmp_path / "k.png").stat().st_size > 0


def test_bytes_and_operations_of_a_case() -> None:
    case = kernel_cases.Case(**CASE, queries=5)
    assert case.tokens == 15 and case.kv_bytes(2) == 3 * 20 * 2 * 2 * 8 * 2
    # Five queries over 16, 17, ... 20 positions, in three rows; two products of 4 heads of 8.
    assert case.flops() == 3 * (16 + 17 + 18 + 19 + 20) * 4 * 4 * 8
    ragged = kernel_cases.Case(**CASE, ragged=True)
    assert ragged.lengths.tolist() == [1, 10, 20]
    inputs = kernel_cases.make_inputs(case, jnp.float32, copies=2)
    pages = np.concatenate([np.ravel(t) for t in inputs.page_tables])
    assert sorted(pages) == list(range(1, 19))  # each page once, page 0 never


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "must be a list of cases"),
        ('[{"rows": 1}]', "case 0: got .*, must have rows, context"),
        ('[{"rows": 1, "context": 8, "row": 2}]', "case 0: got .*, must have rows, context"),
        ('[{"rows": 0, "context": 8}]', "case 0: rows: got 0, must be"),
        ('[{"rows": 1, "context": 8, "queries": 9}]', "queries: got 9, must be at most"),
        ('[{"rows": 1, "context": 8, "heads": 3, "kv_heads": 2}]', "heads: got 3, must be a mul"),
    ],
)
def test_grids_that_are_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "grid.json"
    file.write_text(text)
    with pytest.raises(InvalidConfig, match=says):
        kernel_cases.read_grid(str(file), 16)


@pytest.mark.parametrize("name", ["small", "full"])
def test_grids_have_the_platforms_pages_and_others_beside(name: str, tmp_path: Path) -> None:
    for size in (16, 32):
        cases = kernel_cases.read_grid(name, size)
        assert len({*cases}) == len(cases), "no case twice"
        sizes = [case.page_size for case in cases]
        assert sizes.count(size) > len(cases) / 2 and {16, 32} <= {*sizes}
        file = tmp_path / "grid.json"
        file.write_text('[{"rows": 1, "context": 8}, {"rows": 1, "context": 8, "page_size": 64}]')
        assert [c.page_size for c in kernel_cases.read_grid(str(file), size)] == [size, 64]


@pytest.mark.usefixtures("hasty")
def test_what_is_left_out_is_said(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ORACLE_WORK", 0)
    grid = kernel_cases.read_grid("small", PLATFORMS["cpu"].page_size)[:2]
    by_page_size = {PLATFORMS["cpu"].page_size: grid}  # and no other is asked for
    monkeypatch.setitem(kernel_cases.GRIDS, "small", by_page_size.__getitem__)
    said = bench("kernels", "--backends=reference", "--grid=small")
    assert said["attention"] == [] and said["kv_write"]
    why = "the reference would take too long"
    assert said["left_out"] == [f"reference: {case.name}: {why}" for case in grid]
    # The clock of that module alone: servers of other tests live in this process.
    clock = SimpleNamespace(monotonic=iter(range(0, 10**9, 100)).__next__)
    monkeypatch.setattr(kernels, "time", clock)
    said = bench("kernels", "--backends=blockwise", "--grid=small", "--seconds=1")
    assert said["attention"] == said["kv_write"] == []
    assert len(said["left_out"]) == 4 and all("time was up" in t for t in said["left_out"])


# Output


def test_a_plot_that_cannot_be_made_is_refused_first(
    refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = refused("scheduler", f"--plot={tmp_path / 'no' / 'p.png'}")
    assert "--plot: got " in said and "must be in a folder that exists" in said
    said = refused("scheduler", f"--plot={tmp_path / 'p.jpeg2'}")
    assert "--plot: got " in said and "must end in .png or .svg" in said
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    said = refused("scheduler", "--plot=p.png")
    assert "--plot: needs matplotlib; install it by pip install 'quire[bench]'" in said
    said = refused("kernels", "--backends=fast")
    assert "backends: got 'fast', must be among reference, blockwise" in said


def test_frontend_reads_every_token_and_says_what_it_cost(bench: Bench) -> None:
    said = bench("frontend", "--streams=4", "--seconds=1", "--clients=1")
    assert said["tokens_per_second"] > 0 and 0 < said["messages_per_token"] <= 1
    assert sum(said["delays"].values()) == said["tokens_per_second"] * said["seconds"]
    assert set(said["cores"]) == set(said["us_per_message"]) == {"frontends", "engine", "clients"}


# Plots


def drawn(draw: Callable[[Any, Any], None], results: dict[str, Any]) -> Any:
    """The first axes of a picture."""
    figure = Figure()
    draw(figure, results)
    figure.draw_without_rendering()
    return figure.axes[0]


@pytest.mark.parametrize("sizes", [[8], [1, 64]])
def test_ticks_stand_at_what_was_measured(sizes: list[int]) -> None:
    steps = {str(size): {"median": 5.0} for size in sizes}
    axes = drawn(latency._draw, {"decode_step_ms": steps, "ttft_ms": {}})
    assert axes.get_xticks().tolist() == sizes
    assert [label.get_text() for label in axes.get_xticklabels()] == list(map(str, sizes))
    assert axes.get_xlim()[0] < sizes[0] and sizes[-1] < axes.get_xlim()[1]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 5
    axes = drawn(latency._draw, {"decode_step_ms": {}, "ttft_ms": {}})
    assert [text.get_text() for text in axes.texts] == ["nothing was measured"]


@pytest.mark.parametrize("count", [1, 2, 9])
def test_few_bars_are_no_wider_than_several(count: int) -> None:
    runs = [{"output_tok_s": 100.0}] * count
    names = {"settings": {"model": "m"}, "trace": {"name": "t"}}
    axes = drawn(throughput._draw, {"repetitions": runs, **names})
    assert axes.patches[0].get_width() <= np.ptp(axes.get_xlim()) / 4
    row = {"name": "case", "backend": "gpu", "share_of_limit": 0.5}
    axes = drawn(kernels._draw, {"attention": [{**row, "name": str(n)} for n in range(count)]})
    assert axes.patches[0].get_height() <= abs(np.ptp(axes.get_ylim())) / 4
    assert axes.get_xlim() == (0, 1) and len(axes.get_yticks()) == count


def test_phases_of_a_start_are_not_added_up() -> None:
    """They overlap: the bar of all is as long as the run was."""
    cold = {"phases": {"programs": 9.0, "lowering": 5.0}, "seconds": 10.0}
    warm = {"phases": {"programs": 2.0}, "seconds": 3.0}
    settings = {"model": "m"}
    axes = drawn(startup._draw, {"cold": cold, "warm": [warm], "settings": settings})
    assert [bar.get_width() for bar in axes.patches] == [9, 5, 10, 2, 0, 3]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "programs", "lowering", "to first token",
    ]  # fmt: skip
