"""The table of docs/metrics.md and the dashboard, against what a server really exposes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from scripted import Scripted

from quire.errors import Overloaded
from quire.serving.telemetry.telemetry import Telemetry

DOCS = Path(__file__).resolve().parents[3] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "quire.json").read_text())
SERIES_OF = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@pytest.fixture(scope="module")
def registry() -> Iterator[CollectorRegistry]:
    telemetry = Telemetry()
    registry = telemetry.keep_metrics()
    s = Scripted(telemetry)
    telemetry.watch(s.source)
    s.submit("a")
    s.run(0.1)
    telemetry.refused(Overloaded("full"))
    telemetry.flush(20)
    yield registry
    telemetry.close()


def exposed(registry: CollectorRegistry) -> dict[str, tuple[str, set[str]]]:
    """Each series' type and labels, without those that its type brings."""
    found: dict[str, tuple[str, set[str]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            found[sample.name] = family.type, set(sample.labels) - {"le"}
    return found


def test_the_table_lists_what_there_is(registry: CollectorRegistry) -> None:
    text = (DOCS / "metrics.md").read_text()
    table = re.findall(r"^\| `(quire_\w+)` \| (\w+) \|([^|]*)\|", text, re.M)
    assert len(table) > 30
    listed: dict[str, tuple[str, set[str]]] = {}
    for name, kind, labels in table:
        base = name.removesuffix("_total") if kind == "counter" else name
        assert (kind == "counter") == name.endswith("_total"), name
        names = {label.partition(":")[0].strip() for label in labels.split(";")}
        for suffix in SERIES_OF[kind]:
            listed[base + suffix] = kind, names - {""}
    real = {name: of for name, of in exposed(registry).items() if name.startswith("quire_")}
    assert listed == real


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_every_metric_that_the_dashboard_asks_for_exists(registry: CollectorRegistry) -> None:
    real = exposed(registry)
    asked = {
        name for e in expressions() for name in re.findall(r"\b(?:quire|process|python)_\w+", e)
    }
    assert len(asked) > 25 and asked <= set(real)
    for expression in expressions():
        for name in re.findall(r"rate\((\w+)|increase\((\w+)", expression):
            # Of a gauge or a sum of gauges a rate means nothing.
            assert real[name[0] or name[1]][0] in ("counter", "histogram"), expression
        for by in re.findall(r"by \(([^)]*)\)", expression):
            metric = re.findall(r"quire_\w+", expression)[0]
            assert set(by.replace(" ", "").split(",")) - {"le"} <= real[metric][1], expression


def test_the_signs_of_trouble_are_on_the_dashboard() -> None:
    asked = " ".join(expressions())
    signs = (
        "ready",
        "waiting",
        "preemptions",
        "failed_steps",
        "compiles",
        "errors",
        "dropped",
        "restarts",
        "frontends",
    )
    for sign in signs:
        assert re.search(rf"quire_\w*{sign}", asked), sign


def test_every_query_looks_at_the_chosen_servers_alone() -> None:
    for expression in expressions():
        selectors = re.findall(r"(?:quire|process|up)\w*\{([^}]*)\}", expression)
        metrics = re.findall(r"\b(?:quire|process)_\w+|\bup\b", expression)
        assert len(selectors) == len(metrics), expression
        for selector in selectors:
            assert 'job=~"$job",instance=~"$instance"' in selector, expression


def test_the_dashboard_can_be_imported_and_read() -> None:
    assert DASHBOARD["uid"] == "quire" and DASHBOARD["schemaVersion"] >= 36
    assert [v["name"] for v in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        several = len(panel["targets"]) > 1
        assert all(t["legendFormat"] for t in panel["targets"]) or not several, panel["title"]


def test_what_is_seen_first_is_whether_it_is_healthy() -> None:
    stats = [panel for panel in DASHBOARD["panels"] if panel["type"] == "stat"]
    assert len(stats) == 8 and {panel["gridPos"]["y"] for panel in stats} == {1}
    for panel in stats:
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert {step["color"] for step in steps} >= {"red", "green"}, panel["title"]
