"""How a frontend's public port talks: message sizes, compression, keepalive, TLS.

The one place where settings become options of grpc. Used by serving/frontend/server.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from ...config import ServerConfig
from ..tls_files import TlsFiles
from .tls import tls_credentials

ANSWER_WITHIN = 20.0
"""Seconds that a caller has to answer when its silent connection is looked at."""

LOOKS_ALLOWED = 10.0
"""Seconds between two looks of a caller at our end; who looks more often is sent away."""

_UNCOUNTED = 64
"""Calls of a connection besides those that the frontend counts, such as health checks."""

_COMPRESSION = {"none": None, "gzip": grpc.Compression.Gzip}


def make_server(
    settings: ServerConfig,
    *,
    shared: bool = False,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> grpc.aio.Server:
    """A server without a port.

    Args:
      shared: other processes have the port too, and get some of the calls. Otherwise grpc, too,
        would let a second server bind it.
    """
    return grpc.aio.server(
        interceptors=tuple(interceptors),
        options=[*_options(settings), ("grpc.so_reuseport", int(shared))],
        # Of responses, where callers say that they can read it; requests may come compressed.
        compression=_COMPRESSION[settings.compression],
    )


def add_port(server: grpc.aio.Server, address: str, settings: ServerConfig) -> int:
    """Takes the port, with TLS where there are files for it; returns its number.

    Raises:
      InvalidConfig: a TLS file is wrong.
      RuntimeError: the address cannot be bound.
    """
    files = TlsFiles.of(settings)
    if files is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, tls_credentials(files))


def _options(settings: ServerConfig) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_size),
        # Of a connection, whose caller then waits without a word; the frontend's own limit
        # (admission.py) tells it why, and so comes first.
        ("grpc.max_concurrent_streams", settings.max_calls + _UNCOUNTED),
        # Finds out about callers that vanished without a word, whose requests would hold their
        # pages; and keeps balancers from closing connections on which nothing is said.
        ("grpc.keepalive_time_ms", settings.keepalive * 1000),
        # The second is what counts in newer versions of grpc, whatever its documentation says.
        ("grpc.keepalive_timeout_ms", int(ANSWER_WITHIN * 1000)),
        ("grpc.http2.ping_timeout_ms", int(ANSWER_WITHIN * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # grpc's own is 300 s; clients look for a vanished server more often.
        ("grpc.http2.min_ping_interval_without_data_ms", int(LOOKS_ALLOWED * 1000)),
    ]
