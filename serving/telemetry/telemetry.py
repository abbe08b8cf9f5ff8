"""Metrics, log and traces of one service, behind one object.

Made by whoever runs the engine for a service, before the model loads: `open_telemetry`. It then
gives it every step's outputs (`on_outputs`) and, once there is one, the engine (`watch`).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from ...config import ServerConfig
from ...errors import InvalidConfig, QuireError
from ...sched.request import RequestOutput
from .report import Report, report_of, report_of_refused
from .request_log import RequestLog, TextOf

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from .engine_metrics import EngineCollector
    from .request_spans import RequestSpans
    from .source import Source

log = logging.getLogger(__name__)

MOST_PENDING = 10_000
"""Requests whose account is still to be given. More than that come together only where something
does not get on; then the next are dropped, and counted."""

LAST_ACCOUNTS = 3.0
"""Seconds that a service which ends takes for what it has still to tell."""

_Heard = list[RequestOutput | Report]


class Account(Protocol):
    """Hears of every request that is over, on the telemetry thread."""

    def ended(self, report: Report) -> None: ...


class Telemetry:
    """Takes what is over from the engine's thread, and gives account of it on another.

    Attributes:
      address: HOST:PORT of the metrics, where there are any.
    """

    def __init__(self) -> None:
        self.address: str | None = None
        self.dropped = 0
        self._accounts: list[Account] = []
        self._request_log: RequestLog | None = None
        self._collector: EngineCollector | None = None
        self._closing = ExitStack()
        self._pending: queue.SimpleQueue[_Heard | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="quire-telemetry", daemon=True)
        self._thread.start()

    def add(self, account: Account, close: Callable[[], None] | None = None) -> None:
        """One more to hear of requests, and how it is closed. Before the first of them."""
        self._accounts.append(account)
        if close is not None:
            self._closing.callback(close)

    def log_requests(self, *, prompts: bool) -> None:
        """Writes a line a request."""
        self._request_log = RequestLog(prompts=prompts)
        self.add(self._request_log, self._request_log.close)

    def keep_metrics(self) -> CollectorRegistry:
        """Returns where metrics are, those of a service that has no engine yet."""
        from .endpoint import new_registry
        from .engine_metrics import EngineCollector
        from .request_metrics import RequestMetrics

        registry = new_registry()
        self._collector = EngineCollector(lambda: self.dropped)
        registry.register(self._collector)
        self.add(RequestMetrics(registry))
        return registry

    def serve_metrics(self, host: str, port: int) -> None:
        """Lets metrics be scraped.

        Raises:
          Unavailable: the address cannot be bound.
        """
        from .endpoint import Endpoint

        endpoint = Endpoint(host, port, self.keep_metrics())
        self.address = endpoint.address
        self._closing.callback(endpoint.close)

    def watch(self, source: Source, text_of: TextOf | None = None) -> None:
        """The engine is there.

        Args:
          source: where its figures come from.
          text_of: gives the text of token ids, for logs of prompts.
        """
        if self._collector is not None:
            self._collector.source = source
        if self._request_log is not None:
            self._request_log.text_of = text_of

    def on_outputs(self, outputs: list[RequestOutput]) -> None:
        """Hears of what a step gave. Called on the engine's thread, and costs it a look at each."""
        ended: _Heard = [output for output in outputs if output.ended]
        if ended:
            self._put(ended)

    def refused(self, error: QuireError, request_id: str = "", tenant: str = "") -> None:
        """Hears of a call that failed without the engine, or behind its back. From any thread."""
        self._put([report_of_refused(error, request_id, tenant)])

    def flush(self, timeout: float | None = None) -> None:
        """Returns when account is given of all that was heard until now, or after so long."""
        done = threading.Event()
        self._pending.put(done)
        done.wait(timeout)

    def close(self) -> None:
        """Returns when account is given of all that was heard, if that gets on. Idempotent."""
        self._pending.put(None)
        self._thread.join(LAST_ACCOUNTS)
        self._closing.close()

    def _put(self, reports: _Heard) -> None:
        if self._pending.qsize() >= MOST_PENDING:
            self.dropped += len(reports)
        else:
            self._pending.put(reports)

    def _run(self) -> None:
        while (heard := self._pending.get()) is not None:
            if isinstance(heard, threading.Event):
                heard.set()
                continue
            for found in heard:
                self._account_for(found)

    def _account_for(self, found: RequestOutput | Report) -> None:
        try:
            report = found if isinstance(found, Report) else report_of(found)
        except Exception:
            log.exception("request %r is not accounted for", found.request_id)
            return
        for account in self._accounts:
            try:
                account.ended(report)
            except Exception:
                log.exception("request %r is not accounted for", report.request_id)


def open_telemetry(settings: ServerConfig, model: str) -> Telemetry:
    """What the settings ask for.

    Args:
      settings: the user's.
      model: what is served, as the user calls it.

    Raises:
      InvalidConfig: traces are asked for, and cannot be had.
      Unavailable: the address of the metrics cannot be bound.
    """
    spans = None
    if settings.otlp_endpoint is not None:
        spans = _spans(settings.otlp_endpoint, model)
    telemetry = Telemetry()
    if spans is not None:
        telemetry.add(spans, spans.close)
    telemetry.log_requests(prompts=settings.log_prompts)
    try:
        if settings.metrics_port is not None:
            telemetry.serve_metrics(settings.metrics_host, settings.metrics_port)
    except BaseException:
        telemetry.close()
        raise
    return telemetry


def _spans(endpoint: str, model: str) -> RequestSpans:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        from .request_spans import RequestSpans
    except ImportError as error:
        raise InvalidConfig(
            f"otlp_endpoint: got {endpoint!r}, must be empty: traces need OpenTelemetry, which is "
            f"not installed ({error}); pip install 'quire[otel]'"
        ) from error
    return RequestSpans(OTLPSpanExporter(endpoint=endpoint), model)
