"""`quire bench pages`: that both runs are counted right, and that what must not happen is said. No
figure is held against a clock."""

from __future__ import annotations

import dataclasses
import json
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from quire.model.plan import StepOutputs, StepPlan
from quire.sched.engine import Engine
from quire.sched.request import Request
from quire.sched.scheduler import Scheduler
from quire.serving.assemble import Assembled
from quire.tools.bench import closed_loop, engine_run, pages
from quire.tools.bench.null_runner import NullRunner, null_spec
from quire.tools.cli import main

pytestmark = pytest.mark.usefixtures("collector")


class Paced(NullRunner):
    """Lets other threads run as often as a device would."""

    compiles_after_ready = 0

    def collect(self, handle: StepPlan) -> StepOutputs:
        time.sleep(0.001)
        return super().collect(handle)


def assemble(config: Any, deliver: Any, reporter: Any) -> Assembled:
    """An engine with a runner that computes nothing."""
    spec = null_spec(16, page_size=16, max_model_len=128, pages=129)
    runner: Any = Paced(spec)
    scheduler = Scheduler(spec, max_batched_tokens=64, prefill_chunk=64, max_queue=99)
    engine = Engine(runner, scheduler, overlap=True, on_outputs=deliver)
    engine.start()
    sizes: Any = SimpleNamespace(spec=spec, prefill_chunk=64)
    ids = map(str, count())

    def request(prompt: tuple[int, ...], wanted: Any) -> Request:
        sampling = dataclasses.replace(wanted, seed=0)
        return Request(id=next(ids), prompt=prompt, sampling=sampling)

    intake: Any = SimpleNamespace(request=request)
    return Assembled(engine, intake, runner, sizes, cast(Any, None), {}, 0, 0)


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_run, "assemble", assemble)
    settings = {"model": "m", "sizes": {"kv_bytes_per_token": 8}}
    monkeypatch.setattr(engine_run.TokenEngine, "described", lambda _: settings)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.json"
    file.write_text("[[20, 60], [5, 90], [9, 70]]")
    return file


def test_both_runs(
    folder: Path,
    trace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Steps that cost nothing say nothing of how fast either is.
    monkeypatch.setattr(pages, "MIN_RATIO", 0.0)
    monkeypatch.setattr(pages, "MAX_THRASH", 9.0)
    monkeypatch.setattr(pages, "MIN_ANSWERS", 0)
    plot = tmp_path / "pages.png"
    argv = [f"--model={folder}", f"--trace={trace}", "--share=0.45", f"--plot={plot}", "--json"]
    argv += ["--seconds=1", "--unlimited-seconds=1"]
    assert main(["bench", "pages", *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    free, tight = said["unlimited"], said["limited"]
    assert said["streams"] == 16 and said["problems"] == []
    assert free["preemptions"] == 0 and free["pages_most"] < free["pages"]
    assert tight["pages"] == said["pages"] == round(0.45 * free["pages_most"])
    assert 0 < tight["pages_most"] <= tight["pages"]
    assert tight["preemptions"] > 0 and tight["running_mean"] < free["running_mean"]
    assert tight["thrash"] == pytest.approx(
        tight["recomputed_tokens"]
        / (tight["output_tok_s"] * (tight["seconds"] - tight["settled_after"]))
    )
    assert tight["answers"] > 0 and tight["failed_steps"] == 0
    assert said["ratio"] == pytest.approx(tight["output_tok_s"] / free["output_tok_s"])
    assert said["at_rest"] == {"running": 0, "waiting": 0, "pages_used": 0}
    assert said["kv_memory"] % (said["pages"] + 1) == 0
    looks = tight["over_time"]
    assert all(look["pages_used"] <= said["pages"] for look in looks) and len(looks) > 5
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_must_not_happen_is_said() -> None:
    fine = {"thrash": 0.01, "failed_steps": 0, "preemptions": 0}
    free = {**fine, "answers": 9, "running_mean": 7.9}
    fine["running_mean"] = 4.0
    rest = {"running": 0, "waiting": 0, "pages_used": 0}
    results: dict[str, Any] = {
        "ratio": 0.95, "pages": 100, "streams": 8, "unlimited": free, "limited": fine,
        "at_rest": rest,
    }  # fmt: skip
    assert pages._problems(results) == []
    wrong = {
        "with 100 pages 50.0% of": {"ratio": 0.5},
        "0.30 tokens computed again": {"limited": {**fine, "thrash": 0.3}},
        "2 steps failed in the limited run": {"limited": {**fine, "failed_steps": 2}},
        "at rest there are {'pages_used': 3}": {"at_rest": {**rest, "pages_used": 3}},
        "7 answers of 8 requests under way": {"unlimited": {**free, "answers": 7}},
        "the unlimited run was short of pages": {"unlimited": {**free, "preemptions": 1}},
        "100 pages were no limit: 7.8 requests": {"limited": {**fine, "running_mean": 7.8}},
    }
    for says, change in wrong.items():
        (problem,) = pages._problems({**results, **change})
        assert problem.startswith(says)


@pytest.mark.parametrize("share", ["0", "1.1", "half", "nan"])
def test_shares_that_are_none(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "pages", f"--share={share}"])
    assert f"got '{share}', must be a number above 0, at most 1" in capsys.readouterr().err


def test_too_few_pages_for_one_request(
    folder: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--model={folder}", f"--trace={trace}", "--share=0.02"]
    assert main(["bench", "pages", *argv, "--seconds=1", "--unlimited-seconds=1"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "share: got 0.02, which makes " in said and "longest request of the trace needs" in said


def test_an_unlimited_run_that_is_too_short(
    folder: Path,
    trace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It ends while its first requests are still being submitted."""
    monkeypatch.setattr(closed_loop.ClosedLoop, "_submit", lambda self: time.sleep(0.15))
    argv = [f"--model={folder}", f"--trace={trace}", "--seconds=1", "--unlimited-seconds=1"]
    assert main(["bench", "pages", *argv, "--streams=8"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "unlimited_seconds: got 1, too short for 8 requests under way" in said


def test_a_picture_whose_requests_are_not_dwarfed_by_preemptions() -> None:
    from matplotlib.figure import Figure

    looks = [
        {"at": at, "pages_used": 9, "running": 12, "waiting": 4, "preemptions": 7 + 900 * at}
        for at in range(9)
    ]
    limited = {"over_time": looks, "output_tok_s": 1.0}
    figure = Figure()
    pages._draw(figure, {"pages": 10, "ratio": 1.0, "limited": limited})
    _, requests, preemptions = figure.axes
    assert requests.get_ylim()[1] < 20
    (line,) = preemptions.get_lines()
    assert list(line.get_ydata())[:2] == [0, 900]
    legend = requests.get_legend()
    assert legend is not None and len(legend.get_texts()) == 3
