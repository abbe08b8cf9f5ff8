"""Logs: their two forms, and the line a request gets."""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from absl import logging as absl_logging
from scripted import Scripted

from quire.errors import InvalidRequest, Overloaded, QuireError, Unauthenticated
from quire.sched.request import FinishReason
from quire.serving.progress import LogReporter
from quire.serving.telemetry.logs import announce, fields, set_up_logs
from quire.serving.telemetry.report import report_of_refused
from quire.serving.telemetry.request_log import STRANGERS_EVERY, RequestLog
from quire.serving.telemetry.telemetry import Telemetry

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Of the process's logs, which these tests set up."""
    root, own, absl = (logging.getLogger(name) for name in (None, "quire", "absl"))
    handlers, levels = root.handlers[:], [logger.level for logger in (root, own, absl)]
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    handler = absl_logging.get_absl_handler().python_handler
    formatter, verbosity = handler.formatter, absl_logging.get_verbosity()
    yield
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    handler.setFormatter(formatter)
    absl_logging.set_verbosity(verbosity)
    root.handlers[:] = handlers
    for logger, level in zip((root, own, absl), levels, strict=True):
        logger.setLevel(level)


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def tell(*, prompts: bool = False, with_text: bool = False) -> None:
    """A telemetry hears of some requests, by name: what became of them."""
    telemetry = Telemetry()
    telemetry.log_requests(prompts=prompts)
    s = Scripted(telemetry)
    if with_text:
        telemetry.watch(s.source, lambda tokens: "".join(chr(97 + token % 26) for token in tokens))
    s.submit("answered", (1, 2, 3), 4, tenant="acme", traceparent=PARENT)
    s.now += 2
    s.step()
    s.run(0.5)
    s.submit("poisoned")
    s.step()
    s.runner.poisoned_slots = {0, 1, 2, 3}
    s.run(0)
    s.submit("gone")
    s.engine.finish("gone", FinishReason.ABORT)
    s.run(0)
    telemetry.refused(InvalidRequest("stop: got 'xylophone'"), "bad", "acme")
    telemetry.refused(Overloaded("queue: 9 requests wait"), "full", "acme")
    telemetry.close()


def test_a_request_is_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "info")
    tell()
    answered, poisoned, gone, bad, full = json_lines(capsys)
    assert answered.pop("time").endswith("+00:00")
    assert answered.pop("logger") == "quire.serving.telemetry.request_log"
    assert answered == {
        "level": "INFO",
        "message": "request ended",
        "request_id": "answered",
        "tenant": "acme",
        "finish_reason": "length",
        "code": None,
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "output_tokens": 4,
        "queue_seconds": 2.0,
        "prefill_seconds": 0.0,
        "decode_seconds": 1.5,
        "preemptions": 0,
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    assert (poisoned["level"], poisoned["code"]) == ("ERROR", "INTERNAL")
    assert "inf or NaN" in poisoned["error"]
    assert (gone["finish_reason"], gone["code"], "error" in gone) == ("abort", None, False)
    assert (bad["message"], bad["code"]) == ("request refused", "INVALID_ARGUMENT")
    assert "xylophone" not in json.dumps(bad)  # it quotes the caller
    assert full["error"] == "queue: 9 requests wait"


def test_a_request_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("text", "info")
    tell()
    lines = capsys.readouterr().err.splitlines()
    assert [line[0] for line in lines] == list("IEIII")
    assert lines[0].endswith(
        "] request ended request_id=answered tenant=acme finish_reason=length prompt_tokens=3 "
        "cached_tokens=0 output_tokens=4 queue_seconds=2.0 prefill_seconds=0.0 decode_seconds=1.5 "
        "preemptions=0 trace_id=0af7651916cd43dd8448eb211c80319c"
    )
    assert "xylophone" not in "".join(lines)


def test_levels_say_which_requests_are_heard_of(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "warning")
    tell()
    assert [line["request_id"] for line in json_lines(capsys)] == ["poisoned"]


def test_strangers_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """They could fill the disk otherwise."""
    set_up_logs("json", "warning")
    now = 100.0
    lines = RequestLog(clock=lambda: now)

    def call(error: QuireError) -> None:
        lines.ended(report_of_refused(error, "", ""))

    for _ in range(1000):
        call(Unauthenticated("API key: not known"))
    now += STRANGERS_EVERY
    for _ in range(500):
        call(Unauthenticated("API key: got none"))
    lines.close()
    lines.close()
    told = json_lines(capsys)
    assert {line["message"] for line in told} == {"calls without a known API key were refused"}
    assert [line["calls"] for line in told] == [1, 1000, 499]


def test_what_is_left_of_strangers_is_told_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "info")
    telemetry = Telemetry()
    telemetry.log_requests(prompts=False)
    for _ in range(3):
        telemetry.refused(Unauthenticated("API key: not known"))
    telemetry.close()
    assert [line["calls"] for line in json_lines(capsys)] == [1, 2]


@pytest.mark.parametrize("with_text", [False, True])
def test_prompts_are_logged_on_request(capsys: pytest.CaptureFixture[str], with_text: bool) -> None:
    set_up_logs("json", "info")
    tell(prompts=True, with_text=with_text)
    answered, *_ = json_lines(capsys)
    if with_text:
        assert answered["prompt"] == "bcd" and [len(text) for text in answered["outputs"]] == [4]
    else:
        assert answered["prompt_token_ids"] == [1, 2, 3]
        assert [len(tokens) for tokens in answered["output_token_ids"]] == [4]


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_caller_cannot_forge_a_line(capsys: pytest.CaptureFixture[str], format: str) -> None:
    set_up_logs(format, "info")
    telemetry = Telemetry()
    telemetry.log_requests(prompts=False)
    telemetry.refused(Overloaded("full"), 'a"\nI0101 request code=OK\x1b[31m', "b c=d\n")
    telemetry.close()
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err
    if format == "text":
        assert r'request_id="a\"\nI0101 request code=OK\u001b[31m" tenant="b c=d\n"' in err


def test_other_libraries_begin_with_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "debug")
    logging.getLogger("jax").info("chatter")
    logging.getLogger("jax").warning("trouble")
    logging.getLogger("quire.sched").debug("detail")
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    lines = json_lines(capsys)
    assert [line["message"] for line in lines[:2]] == ["trouble", "detail"]
    assert lines[2]["logger"] == "py.warnings" and "old" in lines[2]["message"]


def test_uncaught_errors_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "error")
    thread = threading.Thread(target=lambda: 1 // 0, name="worker")
    thread.start()
    thread.join()
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)

    class Untidy:
        def __del__(self) -> None:
            raise RuntimeError("too late")

    Untidy()
    in_thread, in_main, ignored = json_lines(capsys)
    assert in_thread["thread"] == "worker" and "ZeroDivisionError" in in_thread["exception"]
    assert in_main["level"] == "CRITICAL" and "boom" in in_main["exception"]
    assert "Untidy" in ignored["message"] and "too late" in ignored["exception"]


def test_exceptions_come_with_the_fields_of_their_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logs("text", "info")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("quire.x").exception("a call failed", extra=fields(request_id="r"))
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.endswith("] a call failed request_id=r") and rest[-1] == "RuntimeError: boom"


def test_a_start_can_be_told_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "info")
    reporter = LogReporter()
    reporter.note("  14 programs")
    with reporter.phase("loading") as update:
        update(1, 2)
    note, loading = json_lines(capsys)
    assert note["message"] == "14 programs"
    assert loading["message"] == "loading done" and loading["seconds"] >= 0


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_what_scripts_wait_for_is_said_at_every_level(
    capsys: pytest.CaptureFixture[str], level: str
) -> None:
    set_up_logs("json", level)
    announce("ready on 127.0.0.1:50051")
    (line,) = json_lines(capsys)
    assert (line["level"], line["message"]) == ("INFO", "ready on 127.0.0.1:50051")
