"""Holds the public port, so that our frontends share it and nobody else gets it.

The parent's socket never listens. It is bound as one that does not share, so a second server is
refused; then it is made one that shares (SO_REUSEPORT), and frontends can bind beside it, also
those that are started again. While none of them listens, callers are refused at once.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ...errors import Unavailable


@contextmanager
def hold(host: str, port: int) -> Iterator[int]:
    """Holds a port until the block ends; yields its number.

    Args:
      host: a name or an IPv4 or IPv6 address.
      port: 0 takes a free one.

    Raises:
      Unavailable: it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise Unavailable(
            f"host: cannot bind {host}; it is no address, and as a name it cannot be resolved "
            f"({error})"
        ) from error
    with ExitStack() as held:
        for family, _, _, _, address in found:
            try:
                bound = held.enter_context(_bound(family, (address[0], port, *address[2:])))
            except OSError as error:
                shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                why = "another process has the port, or this machine lacks the address"
                raise Unavailable(f"host, port: cannot bind {shown}; {why} ({error})") from error
            port = bound.getsockname()[1]
        yield port


def _bound(family: int, address: tuple) -> socket.socket:
    if address[1]:
        with _new(family) as probe:  # finds whoever listens, whatever they share
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    bound = _new(family)
    try:
        _bind(bound, address)
    except OSError:
        bound.close()
        raise
    with contextlib.suppress(AttributeError):  # a system without it has one frontend
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return bound


def _bind(bound: socket.socket, address: tuple) -> None:
    try:
        bound.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Nobody listens: these are connections of a server that has just ended.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)


def _new(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made
