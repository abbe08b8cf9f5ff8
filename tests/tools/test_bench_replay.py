"""`quire bench replay`: steps take about what was measured, and time passes as it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.model.plan import Bucket, Sampler
from quire.tools.bench.null_runner import null_spec
from quire.tools.bench.replay import play
from quire.tools.bench.step_clock import Work
from quire.tools.bench.step_costs import milliseconds
from quire.tools.bench.trace import Trace
from quire.tools.cli import main


def decode(bucket: int, rows: int, context: int) -> Work:
    shape = Bucket(bucket, bucket, Sampler.GREEDY)
    return Work(shape, rows, rows, rows, rows * context, 0, 0)


def prompt(bucket: int, rows: int, tokens: int, before: int = 0) -> Work:
    shape = Bucket(bucket, rows, Sampler.GREEDY)
    pairs = tokens * before + tokens * (tokens + 1) // 2
    return Work(shape, tokens, 1, 0, 0, before + tokens, pairs)


@pytest.mark.parametrize(
    ("work", "measured"),
    [
        (decode(1, 1, 272), 4.42),
        (decode(64, 64, 272), 5.31),
        (decode(256, 256, 272), 10.24),
        (decode(1024, 1000, 272), 33.36),
        (prompt(128, 112, 128), 5.44),
        (prompt(1024, 896, 1024), 22.5),
        (prompt(2048, 1024, 2048, before=3072), 57.1),  # the mean of 8,192 tokens
    ],
)
def test_steps_take_what_they_took_on_an_h200(work: Work, measured: float) -> None:
    assert milliseconds(work) == pytest.approx(measured, rel=0.07)


def test_more_work_takes_longer() -> None:
    base = milliseconds(decode(256, 250, 300))
    assert milliseconds(decode(256, 250, 400)) > base
    assert milliseconds(decode(512, 250, 300)) > base
    assert milliseconds(prompt(2048, 1024, 2048, 4096)) > milliseconds(prompt(2048, 1024, 2048))
    sizes = [milliseconds(decode(n, n, 1)) for n in range(1, 4100)]
    assert sizes == sorted(sizes)


SPEC = null_spec(8, page_size=32, max_model_len=4096, pages=999)


def test_who_comes_during_a_step_is_in_the_next() -> None:
    """Planned at once it would be in the one after."""
    trace = Trace("t", (40,) * 6, (200, 200, 200, 200, 9, 9))
    due = [0.0] * 4 + [0.5, 0.501]
    late, soon = (play(trace, due, SPEC, late=late) for late in (True, False))
    assert [*late.tokens] == [*soon.tokens] == [*trace.outputs]
    waits = [[first - due for first, due in zip(p.first, p.due, strict=True)] for p in (late, soon)]
    assert waits[0][0] == waits[1][0] and waits[0][5] < waits[1][5]
    assert late.seconds == pytest.approx(soon.seconds, rel=0.01)
    assert late.seconds == pytest.approx(sum(step.seconds for step in late.steps))


def test_of_a_closed_loop_so_many_are_under_way() -> None:
    trace = Trace("t", (9,) * 7, (5, 9, 3, 4, 8, 2, 6))
    played = play(trace, [0.0] * 7, SPEC, most=2)
    assert played.tokens == [*trace.outputs]
    under_way = [
        sum(due <= at < last for due, last in zip(played.due, played.last, strict=True))
        for at in played.due
    ]
    assert under_way == [2] * 7


def test_steps_may_be_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.json"
    trace.write_text(json.dumps([[9, 11]]))
    argv = ["bench", "replay", f"--trace={trace}", "--max-num-seqs=4", "--rates=inf", "--json"]
    assert main([*argv, "--step-times=1:2,32:4,64:36"]) == 0
    said = json.loads(capsys.readouterr().out)
    (run,) = said["rates"]
    assert run["steps_by_bucket"]["1 tokens x 1 rows, greedy"]["median_ms"] == pytest.approx(2.0)
    assert run["tpot_ms"]["p50"] == pytest.approx(2.0)
    (prompt,) = run["steps_by_bucket"].keys() - {"1 tokens x 1 rows, greedy"}
    tokens = int(prompt.split()[0])
    assert 32 <= tokens <= 64 and run["ttft_ms"]["p50"] == pytest.approx(4 + tokens - 32)
    assert said["settings"]["step_times"] == [[1, 2.0], [32, 4.0], [64, 36.0]]


@pytest.mark.parametrize(
    "times", ["", "1", "1:x", "32:4,1:2", "1:2,1:3", "1:0", "1:2:3", "1:inf", "0:1", "-1:2"]
)
def test_times_that_are_none(times: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "replay", f"--step-times={times}"])
    assert "--step-times" in capsys.readouterr().err


def test_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plot = tmp_path / "t.json", tmp_path / "p.svg"
    trace.write_text(json.dumps([[20, 5], [300, 4], [40, 1], [9, 9]]))
    argv = [f"--trace={trace}", "--max-num-seqs=4", "--rates=inf,40", f"--plot={plot}", "--json"]
    assert main(["bench", "replay", *argv]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [run["rate_req_s"] for run in said["rates"]] == [None, 40]
    for run in said["rates"]:
        assert run["requests"] == 4 and run["output_tok_s"] * run["seconds"] == pytest.approx(19)
        assert sum(seen["count"] for seen in run["steps_by_bucket"].values()) == run["steps"]
        assert 0 < run["ttft_ms"]["p50"] <= run["ttft_ms"]["p99"]
    assert plot.read_text().startswith("<?xml") and "device" not in said
