"""Logs on stderr, by absl's handler: lines for people, or JSON objects for machines.

`set_up_logs` is called once, first thing in each process of a service. What is logged goes through
Python's own `logging`; whoever has more to say than a message gives `extra=fields(name=value)`.
Callers' words reach a line escaped, so that nobody can forge one.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from absl import flags
from absl import logging as absl_logging

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/@+")

log = logging.getLogger(__name__)
_announcements = logging.getLogger(f"{__name__}.announcements")


def fields(**values: Any) -> dict[str, Any]:
    """What a log record says besides its message: numbers, text, lists of them, None."""
    return {"fields": values}


def announce(text: str) -> None:
    """Logs what scripts wait for, at level info and whatever the least severe level to log is."""
    _announcements.info("%s", text)


def set_up_logs(format: str, level: str) -> None:
    """Sends this process's logs to stderr. Of the whole process.

    Args:
      format: "text" or "json".
      level: "debug", "info", "warning" or "error": of Quire's own messages. Other libraries' begin
        with warnings.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Quire has its own; absl would remark on it
    flags.FLAGS["logtostderr"].value = True  # to stderr as it is then, not as it was at the import
    absl_logging.use_absl_handler()
    formatter = JsonFormatter() if format == "json" else TextFormatter()
    absl_logging.get_absl_handler().setFormatter(formatter)
    own = logging.getLevelNamesMapping()[level.upper()]
    absl_logging.set_verbosity(absl_logging.ERROR if own >= logging.ERROR else absl_logging.WARNING)
    logging.getLogger(__package__.partition(".")[0]).setLevel(own)
    _announcements.setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook, threading.excepthook = _uncaught, _uncaught_in_thread
    sys.unraisablehook = _ignored


class TextFormatter(absl_logging.PythonFormatter):
    """absl's lines, with fields as name=value at their end."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = getattr(record, "fields", {})
        parts = [f"{name}={_shown(value)}" for name, value in found.items() if value is not None]
        return " ".join([record.message, *parts])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        found = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


def _shown(value: Any) -> str:
    if isinstance(value, str) and value and _PLAIN.issuperset(value):
        return value
    readable = isinstance(value, str) and value.isprintable()
    return json.dumps(value, ensure_ascii=not readable, default=str)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        log.critical("uncaught error", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread else None
        error = (args.exc_type, args.exc_value, args.exc_traceback)
        log.critical("uncaught error in a thread", exc_info=error, extra=fields(thread=name))


def _ignored(args: sys.UnraisableHookArgs) -> None:
    if args.exc_value is not None:
        error = (args.exc_type, args.exc_value, args.exc_traceback)
        log.error("error ignored in %r", args.object, exc_info=error)
