"""The port that metrics are read from: prometheus_client's own server over one registry."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector

from ...errors import Unavailable


def new_registry() -> CollectorRegistry:
    """A registry with what is known of the process itself: memory, CPU time, open files."""
    # A second series for each of ours, to say when it was made.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class Endpoint:
    """Serves http://HOST:PORT/metrics from threads of its own, until closed.

    Args:
      host: address to bind.
      port: 0 takes a free one.
      registry: what is served.

    Raises:
      Unavailable: the address cannot be bound.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry):
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host, registry)
        except OSError as error:
            raise Unavailable(
                f"metrics_host, metrics_port: cannot bind {_shown(host, port)} ({error})"
            ) from error
        self.address = _shown(host, self._server.server_port)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
