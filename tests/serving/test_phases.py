"""Phases of a start: from the process's first line, overlapping ones added up."""

from __future__ import annotations

import threading
import time

from quire.serving.phases import Phases, process_began


def test_the_process_began_before_this_line_and_not_long_ago() -> None:
    began = process_began()
    assert began is not None
    assert 0 < time.monotonic() - began < 24 * 3600
    assert abs(process_began() - began) < 5


def test_what_passed_before_is_imports_where_it_is_known() -> None:
    before = time.monotonic()
    phases = Phases(began=before - 7)
    assert 7 <= phases.seconds["imports"] <= 7 + time.monotonic() - before
    assert "imports" not in Phases().seconds
    assert 7 <= phases.done()["ready"] <= 7 + time.monotonic() - before


def test_phases_overlap_and_add_up() -> None:
    phases, begun, go = Phases(), threading.Event(), threading.Event()

    def work() -> None:
        with phases("loading"):
            begun.set()
            assert go.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    for _ in range(2):
        with phases("programs"):
            time.sleep(0.01)
    go.set()
    thread.join()
    done = phases.done()
    assert list(done) == ["programs", "loading", "ready"]
    assert 0.02 <= done["programs"] <= done["ready"] and done["loading"] >= 0.02
