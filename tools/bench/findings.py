"""What the JSON of our own benchmarks says, as figures by the peers' names. Used by compare.py.

A file is refused where its method is not the peers': a figure beside another one shall mean the
same.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InvalidConfig
from .caller_figures import LATE_MS
from .pages import MIN_RATIO
from .peers import Peers


@dataclass(frozen=True, slots=True)
class Findings:
    """One file of results.

    Attributes:
      file: its name.
      bench: which benchmark wrote it.
      model, dtype: what ran; `dtype` may be "auto".
      device: its kind; "" where nobody knows.
      devices: how many the model was cut over.
      settings: that matter for speed, and differ between runs.
      report: all of it.
    """

    file: str
    bench: str
    model: str
    dtype: str
    device: str
    devices: int
    settings: dict[str, Any]
    report: dict[str, Any]


_SETTINGS = (
    "max_num_seqs",
    "max_batched_tokens",
    "prefill_chunk",
    "decode_steps",
    "prefix_caching",
    "overlap",
    "pages",
)


def read_findings(name: str) -> Findings:
    """Reads a file.

    Raises:
      InvalidConfig: it cannot be read, or no benchmark that can be compared wrote it.
    """
    try:
        report = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidConfig(
            f"{name}: must be a file that a benchmark's --json wrote: {error}"
        ) from error
    bench = report.get("bench") if isinstance(report, dict) else None
    if not isinstance(bench, str):
        raise InvalidConfig(f"{name}: must be a file that a benchmark's --json wrote; is not")
    if bench not in _READERS:
        raise InvalidConfig(
            f"{name}: is of `quire bench {bench}`, must be of one of {', '.join(_READERS)}"
        )
    try:
        settings = report["settings"]
        settings = {**settings, **settings.get("sizes", {})}
        return Findings(
            file=name,
            bench=bench,
            model=_text(settings["model"]),
            dtype=_text(settings.get("dtype", "auto")),
            device=(report.get("device") or {}).get("kind", ""),
            devices=settings.get("tensor_parallel", 1),
            settings={key: settings[key] for key in _SETTINGS if settings.get(key) is not None},
            report=report,
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise _unknown(name, bench, error) from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _unknown(name: str, bench: str, error: Exception) -> InvalidConfig:
    return InvalidConfig(
        f"{name}: is not what this version's `quire bench {bench}` writes: {error!r}"
    )


def remarks_on(found: Findings) -> list[str]:
    """What a reader of its figures should know: which load was not sent as it should have been."""
    runs = found.report.get("rates", []) if found.bench == "online" else [found.report]
    return [
        f"{found.file}: sent late, {late:.1f} ms at p99: the callers were too slow for the rate"
        for run in runs
        if (late := run.get("late_ms_p99", 0.0)) > LATE_MS
    ]


def figures_in(found: Findings, peers: Peers) -> dict[str, list[float]]:
    """Every repetition of each figure, by the peers' name.

    Raises:
      InvalidConfig: it was measured in another way than the peers were, lacks what this version
        writes, or has no figure.
    """
    try:
        figures = _READERS[found.bench](found, peers)
    except InvalidConfig:
        raise
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise _unknown(found.file, found.bench, error) from error
    if not figures:
        raise InvalidConfig(f"{found.file}: has no figure to compare")
    for name, values in figures.items():
        if not (isinstance(values, list) and values and all(map(_is_figure, values))):
            raise InvalidConfig(f"{found.file}: {name}: got {values!r}, must be numbers above 0")
    return figures


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _same(found: Findings, what: str, got: Any, theirs: Any) -> None:
    if got != theirs:
        raise InvalidConfig(f"{found.file}: {what}: ours {got}, the peers' {theirs}")


TRACE = {"requests": 1000, "prompt_tokens": 207_595, "output_tokens": 215_747, "clipped": 0}
"""What the peers ran: the shipped sharegpt-like, whole."""

LIMITED_SECONDS = 600
"""What a run at the limit of pages must last, for its target."""


def _throughput(found: Findings, peers: Peers) -> dict[str, list[float]]:
    trace = found.report["trace"]
    for name, theirs in TRACE.items():
        _same(found, f"trace {trace['name']!r}: {name}", trace[name], theirs)
    _same(found, "concurrency", found.report.get("concurrency"), None)
    rates = [run["output_tok_s"] for run in found.report["repetitions"]]
    return {"trace_output_tok_s": rates}


def _latency(found: Findings, peers: Peers) -> dict[str, list[float]]:
    report = found.report
    figures: dict[str, list[float]] = {}
    if report["decode_step_ms"]:
        _same(found, "prompt_tokens of the decode steps", report["prompt_tokens"], 128)
        _same(found, "output_tokens of the decode steps", report["output_tokens"], 272)
    for name in ("decode_step_ms", "ttft_ms"):
        figures |= {f"{name}/{int(size)}": each["all"] for size, each in report[name].items()}
    if (prefix := report["prefix_ms"]) is not None:
        _same(found, "prefix_tokens", prefix["tokens"], 10_000)
        figures["prefix_10k_ms/cold"] = [prefix["cold"]]
        figures["prefix_10k_ms/hit"] = prefix["all_hits"]
    return figures


def _startup(found: Findings, peers: Peers) -> dict[str, list[float]]:
    report, name = found.report, "start_to_first_token_s"
    figures = {f"{name}/cold_caches": [report["cold"]["seconds"]]}
    figures[f"{name}/warm_compile_cache"] = [run["seconds"] for run in report["warm"]]
    return figures


def _serve(found: Findings, peers: Peers) -> dict[str, list[float]]:
    _same(found, "concurrency", found.report.get("concurrency"), None)
    return _served(found, peers, found.report)


def _online(found: Findings, peers: Peers) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {}
    for run in found.report["rates"]:
        for name, values in _served(found, peers, run).items():
            figures.setdefault(name, []).extend(values)
    return figures


def _served(found: Findings, peers: Peers, run: dict[str, Any]) -> dict[str, list[float]]:
    """One rate's."""
    _same(found, "trace", run["trace"]["name"], "sharegpt-like")
    _same(found, "trace: clipped", run["trace"]["clipped"], 0)
    if run["errors"]:
        raise InvalidConfig(f"{found.file}: {run['errors']} of {run['requests']} requests failed")
    if failed := run.get("warmup_errors", 0):  # of `online`
        raise InvalidConfig(f"{found.file}: {failed} requests of the warm-up failed")
    rate = "inf" if run["rate_req_s"] is None else f"{run['rate_req_s']:g}"
    if rate in peers.online_requests:
        _same(found, f"requests at {rate}/s", run["requests"], peers.online_requests[rate])
    figures = {f"online/{rate}/output_tok_s": [run["output_tok_s"]]}
    for kind in ("ttft_ms", "tpot_ms", "itl_ms"):
        for p in ("p50", "p90", "p99"):
            if p in run.get(kind, ()):
                figures[f"online/{rate}/{kind}_{p}"] = [run[kind][p]]
    return figures


def _long(found: Findings, peers: Peers) -> dict[str, list[float]]:
    report = found.report
    size, hit = report["prompt_tokens"], report["hit_tokens"]
    if hit < size - report["settings"]["sizes"]["page_size"]:
        raise InvalidConfig(
            f"{found.file}: hit_tokens: got {hit} of {size}, must be all but a page's: else the "
            "second time is none"
        )
    return {
        f"long_cold_ms/{size:d}": [report["cold_ms"]],
        f"long_hit_ms/{size:d}": report["hit_ms"]["all"],
    }


def _pages(found: Findings, peers: Peers) -> dict[str, list[float]]:
    """Whatever else went wrong, a target must not look met."""
    report = found.report
    _same(found, "trace", report["trace"]["name"], "sharegpt-like")
    _same(found, "trace: clipped", report["trace"]["clipped"], 0)
    if (seconds := report["limited"]["seconds"]) < LIMITED_SECONDS:
        raise InvalidConfig(
            f"{found.file}: seconds: got {seconds:.0f} at the limit, must be at least "
            f"{LIMITED_SECONDS}"
        )
    if report["problems"] and report["ratio"] >= MIN_RATIO:
        raise InvalidConfig(f"{found.file}: {'; '.join(report['problems'])}")
    return {"page_limit_ratio": [report["ratio"]]}


_READERS = {
    "throughput": _throughput,
    "latency": _latency,
    "startup": _startup,
    "serve": _serve,
    "online": _online,
    "long": _long,
    "pages": _pages,
}
