"""How a frontend's public port talks: message sizes, compression, keepalive, TLS.

The one place where settings become options of grpc. Used by serving/server.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from ..config import ServerConfig
from .tls import TlsFiles, tls_credentials

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
    if settings.tls_cert is None or settings.tls_key is None:
        return server.add_insecure_port(address)
    files = TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return server.add_secure_port(address, tls_credentials(files))


def _options(settings: ServerConfig) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", settings.max_message_size),
        # Finds out about callers that vanished without a word, whose requests would hold their
        # pages; and keeps balancers from closing connections on which nothing is said.
        ("grpc.keepalive_time_ms", settings.keepalive * 1000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Lets clients look for a vanished server as often as once in 10 s.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
