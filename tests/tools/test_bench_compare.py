"""`quire bench compare`: that like stands beside like, and that all else is refused by name."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.errors import InvalidConfig
from quire.tools.bench.models import DATA, shipped_configs
from quire.tools.bench.peers import PeerData
from quire.tools.cli import main

MEASURED = Path(__file__).parents[2] / "docs" / "measurements" / "h200_2026-11-22"

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a report like those of the benchmarks, changed at paths such as trace__requests."""

    def write(kind: str, name: str = "ours.json", **changes: Any) -> str:
        report = json.loads((MEASURED / f"{kind}.json").read_text())
        for path, value in changes.items():
            at, *parts = report, *path.split("__")
            for part in parts[:-1]:
                at = at[part]
            at[parts[-1]] = value
        file = tmp_path / name
        file.write_text(json.dumps(report))
        return str(file)

    return write


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def compare(*argv: str) -> dict[str, Any]:
        assert main(["bench", "compare", *argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return compare


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refused(*argv: str) -> str:
        assert main(["bench", "compare", *argv]) == 1
        said = capsys.readouterr()
        assert said.out == "" and "Traceback" not in said.err
        return said.err

    return refused


def by_name(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {line["name"]: line for line in lines}


def served(rate: float, requests: int, **changes: Any) -> dict[str, Any]:
    percentiles = {"p50": 10.0, "p90": 20.0, "p99": 30.0, "mean": 12.0}
    kinds = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
    return {
        "rate_req_s": rate,
        "requests": requests,
        "errors": 0,
        "output_tok_s": 5000.0,
        "trace": {"name": "sharegpt-like", "clipped": 0},
        **dict.fromkeys(kinds, percentiles),
        **changes,
    }


def test_the_data_speak_of_the_same_figures() -> None:
    """A goal with a name that no figure has would never be shown."""
    data = PeerData()
    for model in shipped_configs():
        peers = data.of(model, "bfloat16")
        assert peers is not None and peers == data.of(f"/some/where/{model.upper()}/", "auto")
        extra = {"trace_output_tok_s", "long_hit_ms/200000", "page_limit_ratio"}  # not the peers'
        assert set(peers.goals) <= set(peers.figures) | extra, set(peers.goals) - set(peers.figures)
        for goal in peers.goals.values():
            steps = [g for g in (goal.target, goal.stretch, goal.limit) if g is not None]
            assert steps in (sorted(steps), sorted(steps, reverse=True))
    assert data.of("llama-3.1-8b", "float16") is None and data.of("demo", "auto") is None
    assert data.of("llama-3.1-8b", "bfloat16").figures["online/25/itl_ms_p99"] == 27.7  # type: ignore[union-attr]
    for name in ("peers_h200.json", "targets_h200.json"):
        assert json.loads((DATA / name).read_text())


def test_figures_beside_the_peers(compare: Any, tmp_path: Path) -> None:
    names = ("llama_latency", "llama_throughput", "qwen_startup")
    plot = tmp_path / "compare.svg"
    said = compare(*(str(MEASURED / f"{name}.json") for name in names), f"--plot={plot}")
    assert list(said["models"]) == ["llama-3.1-8b bf16", "qwen2.5-1.5b bf16"]
    llama = by_name(said["models"]["llama-3.1-8b bf16"])
    first = llama["ttft_ms/1024"]
    assert (first["peer"], first["target"], first["limit"]) == (28.0, 25, 20)
    assert first["lowest"] < first["ours"] < first["highest"] and first["measured"] == 5
    assert first["ratio"] == pytest.approx(first["ours"] / 28.0) and first["is_met"] is False
    # With as many requests at once, where the peers were measured so.
    assert llama["trace_output_tok_s"]["peer"] == 11072
    assert llama["trace_output_tok_s"]["better"] == "higher"
    qwen = by_name(said["models"]["qwen2.5-1.5b bf16"])
    assert qwen["start_to_first_token_s/cold_caches"]["peer"] == 74.7
    assert qwen["start_to_first_token_s/warm_compile_cache"]["peer"] is None
    assert plot.read_text().startswith("<?xml")


def test_a_table_says_what_was_met(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", str(MEASURED / "qwen_latency.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    (batch,) = (line.split() for line in lines if "batch 256" in line)
    assert batch[-1] == "met" and "5.14" in batch and "3.30" in batch


def test_files_of_one_benchmark_are_repetitions(compare: Any, write: Write, refused: Any) -> None:
    again = write("llama_throughput", "again.json")
    rates = [9000.0, 11500.0]
    other = write("llama_throughput", repetitions=[{"output_tok_s": rate} for rate in rates])
    (line,) = compare(again, other)["models"]["llama-3.1-8b bf16"]
    assert (line["measured"], line["lowest"], line["highest"]) == (3, 9000.0, 11500.0)
    assert 9000 < line["ours"] < 11500
    for name, value in {"decode_steps": 4, "sizes__prefill_chunk": 512}.items():
        other = write("llama_throughput", **{f"settings__{name}": value})
        assert f"'{name.rpartition('__')[2]}': {value}" in refused(again, other)
    other = write("llama_throughput", settings__max_num_seqs=1024)
    assert "compare them one after the other" in refused(again, other)
    (line,) = compare(other)["models"]["llama-3.1-8b bf16"]
    assert line["peer"] == 12295


def test_a_target_is_met_at_its_value(compare: Any, write: Write) -> None:
    steps = {"1": {"all": [4.2]}, "64": {"all": [5.51]}}
    said = compare(write("llama_latency", decode_step_ms=steps))
    lines = by_name(said["models"]["llama-3.1-8b bf16"])
    assert [lines[f"decode_step_ms/{batch}"]["is_met"] for batch in (1, 64)] == [True, False]
    said = compare(write("llama_throughput", repetitions=[{"output_tok_s": 15500}]))
    assert said["models"]["llama-3.1-8b bf16"][0]["is_met"] is True


def test_online(compare: Any, write: Write, refused: Any) -> None:
    rates = [served(25, 375), served(50, 750)]
    lines = by_name(
        compare(write("llama_latency", bench="online", rates=rates))["models"]["llama-3.1-8b bf16"]
    )
    line = lines["online/25/ttft_ms_p99"]
    assert (line["ours"], line["peer"], line["target"], line["is_met"]) == (30.0, 66.5, 45, True)
    assert lines["online/50/output_tok_s"]["peer"] == 7843
    file = write("llama_latency", bench="online", rates=[served(25, 100)])
    assert "requests at 25/s: ours 100, the peers' 375" in refused(file)
    file = write("llama_latency", bench="online", rates=[served(25, 375, errors=2)])
    assert "2 of 375 requests failed" in refused(file)
    file = write("llama_latency", bench="serve", **served(25, 375))
    assert "online/25/tpot_ms_p50" in by_name(compare(file)["models"]["llama-3.1-8b bf16"])


LONG = {"bench": "long", "prompt_tokens": 200_000, "cold_ms": 9e3, "hit_tokens": 199_968}
PAGES = {"bench": "pages", "limited": {"seconds": 600.1}, "problems": []}


def test_what_the_peers_were_not_asked_has_a_target(compare: Any, write: Write) -> None:
    long = write("llama_latency", **LONG, hit_ms={"all": [90.0, 95.0, 130.0]})
    missed = {**PAGES, "problems": ["with 10 pages 89% of"]}
    pages = write("llama_throughput", "pages.json", **missed, ratio=0.89)
    lines = by_name(compare(long, pages)["models"]["llama-3.1-8b bf16"])
    line = lines["long_hit_ms/200000"]
    assert (line["ours"], line["peer"], line["target"], line["is_met"]) == (95.0, None, 100, True)
    assert lines["long_cold_ms/200000"]["metric"] == "200,000 tokens, the first time, ms"
    assert lines["page_limit_ratio"]["is_met"] is False
    pages = write("llama_throughput", "pages.json", **PAGES, ratio=0.91)
    assert compare(pages)["models"]["llama-3.1-8b bf16"][0]["is_met"] is True


def test_a_target_is_not_met_by_a_run_that_was_none(refused: Any, write: Write) -> None:
    file = write("llama_latency", **{**LONG, "hit_tokens": 0}, hit_ms={"all": [1.0]})
    assert "hit_tokens: got 0 of 200000" in refused(file)
    wrong = {
        "seconds: got 25 at the limit, must be at least 600": {"limited": {"seconds": 25.0}},
        "3 steps failed": {"problems": ["3 steps failed"]},
        "trace: clipped: ours 1, the peers' 0": {"trace__clipped": 1},
    }
    for says, change in wrong.items():
        assert says in refused(write("llama_throughput", **{**PAGES, **change}, ratio=0.95))
    run = served(25, 375, warmup_errors=2)
    file = write("llama_latency", bench="online", rates=[run])
    assert "2 requests of the warm-up failed" in refused(file)


def test_callers_that_were_too_slow_are_noted(compare: Any, write: Write) -> None:
    runs = [served(25, 375, late_ms_p99=2.0), served(50, 750, late_ms_p99=40.0)]
    file = write("llama_latency", bench="online", rates=runs)
    assert compare(file, file)["notes"] == [
        f"{file}: sent late, 40.0 ms at p99: the callers were too slow for the rate"
    ]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama_latency", {"settings__model": "demo"}, "model: ours demo in bfloat16, the peers'"),
        ("llama_latency", {"settings__sizes__dtype": "float32"}, "llama-3.1-8b in float32, the pe"),
        ("llama_latency", {"device__kind": "NVIDIA A100"}, "ours NVIDIA A100, the peers' NVIDIA H"),
        ("llama_latency", {"device": None}, "device: ours not named in the file, the peers'"),
        ("llama_latency", {"settings__tensor_parallel": 2}, "ours 2 of NVIDIA H200, the peers'"),
        ("llama_latency", {"prompt_tokens": 64}, "prompt_tokens of the decode steps: ours 64, the"),
        ("llama_latency", {"output_tokens": 64}, "output_tokens of the decode steps: ours 64, the"),
        ("llama_latency", {"prefix_ms__tokens": 9}, "prefix_tokens: ours 9, the peers' 10000"),
        ("llama_throughput", {"trace__requests": 10}, "requests: ours 10, the peers' 1000"),
        ("llama_throughput", {"concurrency": 256}, "concurrency: ours 256, the peers' None"),
        ("llama_throughput", {"trace__clipped": 1}, "clipped: ours 1, the peers' 0"),
        ("llama_throughput", {"bench": "soak"}, "is of `quire bench soak`, must be of one of"),
        ("llama_throughput", {"bench": "latency"}, "is not what this version's `quire bench laten"),
        ("llama_throughput", {"settings": 3}, "is not what this version's `quire bench throughp"),
        ("llama_start_cold", {}, "must be a file that a benchmark's --json wrote; is not"),
    ],
)  # fmt: skip
def test_what_is_not_alike_is_refused(
    refused: Any, write: Write, kind: str, changes: dict[str, Any], says: str
) -> None:
    file = write(kind, **changes)
    said = refused(file)
    assert says in said and file in said


BAD_RATE = served("x", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama_throughput", {"repetitions": []}, "trace_output_tok_s: got [], must be numbers"),
        ("llama_throughput", {"repetitions": [{"output_tok_s": "x"}]}, "got ['x'], must be numbe"),
        ("llama_throughput", {"repetitions": [{"output_tok_s": math.nan}]}, "got [nan], must be"),
        ("llama_latency", {"decode_step_ms": {"1": {"all": [0.0]}}}, "decode_step_ms/1: got [0.0]"),
        ("llama_latency", {"decode_step_ms": {"1": {"all": 5}}}, "decode_step_ms/1: got 5, must"),
        ("llama_latency", {"decode_step_ms": {"x": {"all": [1.0]}}}, "is not what this version's"),
        ("llama_latency", {"decode_step_ms": {}, "ttft_ms": {}, "prefix_ms": None}, "has no figur"),
        ("llama_latency", {"settings__model": 5}, "5 is no name"),
        ("llama_latency", {"settings__sizes__dtype": ["x"]}, "['x'] is no name"),
        ("llama_latency", {"bench": ["latency"]}, "must be a file that a benchmark's --json wrote"),
        ("llama_latency", {"bench": "online", "rates": [BAD_RATE]}, "is not what this version's"),
        ("llama_latency", {"bench": "long", "prompt_tokens": "x"}, "is not what this version's"),
    ],
)  # fmt: skip
def test_what_is_no_figure_is_refused(
    refused: Any, write: Write, kind: str, changes: dict[str, Any], says: str
) -> None:
    assert says in refused(write(kind, **changes))


def test_another_device_only_by_name(compare: Any, write: Write) -> None:
    said = compare(write("llama_latency", device__kind="NVIDIA A100"), "--any-device")
    assert "ours NVIDIA A100, the peers' NVIDIA H200" in said["notes"][0]
    assert said["models"]["llama-3.1-8b bf16"]


@pytest.mark.parametrize("text", ["", "[1]", "{}", "\x00", "[" * 100_000])
def test_files_of_somebody_else(refused: Any, tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    assert "must be a file that a benchmark's --json wrote" in refused(str(file))
    assert "No such file" in refused(str(tmp_path / "nowhere.json"))


def test_the_documentation_marks_what_misses_its_target(compare: Any) -> None:
    """By the measurements that it tells how to compare: each such figure is bold."""
    docs = MEASURED.parents[1]
    page = (docs / "performance.md").read_text()
    (line,) = re.findall("^    quire bench compare (.*)$", page, re.MULTILINE)
    echo = ["bash", "-c", f"echo {line}"]
    said = subprocess.run(echo, check=True, capture_output=True, text=True).stdout
    table = page.split("## Reached and aimed at")[1].split("## ")[0]
    bold = [float(text.replace(",", "")) for text in re.findall(r"\*\*([\d.,]*\d)\*\*", table)]
    results = compare(*(str(docs / "measurements" / file) for file in said.split()))
    assert len(results["models"]) == 2
    for figures in results["models"].values():
        missed = [f for f in figures if f.get("is_met") is False]
        assert missed
        for figure in missed:
            assert pytest.approx(figure["ours"], rel=0.01) in bold, figure["metric"]


def test_the_cause_is_kept() -> None:
    from quire.tools.bench.findings import read_findings

    with pytest.raises(InvalidConfig) as caught:
        read_findings("nowhere.json")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_picture_has_every_number_within_its_axes(compare: Any, write: Write) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from quire.tools.bench.compare import _draw

    names = ("llama_latency", "llama_throughput", "qwen_latency")
    results = compare(*(str(MEASURED / f"{name}.json") for name in names))
    results["models"]["nothing"] = []
    figure = Figure(layout="constrained")
    _draw(figure, results)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        assert axes.texts
        for box in (text.get_window_extent() for text in axes.texts):
            assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
        label = axes.xaxis.label.get_window_extent()
        assert label.x0 >= 0 and label.x1 <= figure.bbox.x1
    assert figure.axes[-1].texts[0].get_text() == "no figure that the peers have"
