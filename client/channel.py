"""How a client connects: address, key, timeouts, and what is tried again. Used by both clients."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from ..config import is_loopback
from ..errors import InvalidConfig, InvalidRequest
from ..protos.v1 import generation_pb2 as pb
from . import checks
from .checks import Metadata
from .tls import TLS

SERVICE: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

MAX_ATTEMPTS = 5
"""What grpc allows at most."""

LOOK_AFTER = 15.0
"""Seconds of silence during a call after which the server is looked at, by default. Quire's own
allows a look every 10 s (serving/frontend/transport.py). Who looks more often than allowed is sent
away, and what ran is done again; grpc's own servers, which a proxy may be built on, by default
allow one in five minutes.
"""

_LOOKS_AT_LEAST = 1.0

ANSWER_WITHIN = 10.0
"""Seconds that the server then has; a call to one that vanished is UNAVAILABLE after both."""

CONNECT_WITHIN = 5.0
"""Seconds that a new connection may take."""

_MAX_MESSAGE_BYTES = 256 << 20
"""Of an answer: log-probabilities of a long one take more than grpc's 4 MB. And of a request that
is made again: prompts may be long."""

_HOST_PORT = re.compile(r"(\[[^\[\]]+\]|[^\[\]:/\s]+):([0-9]{1,5})")
_ON_THIS_MACHINE = ("unix", "unix-abstract", "vsock")
_TARGET = re.compile(rf"({'|'.join(_ON_THIS_MACHINE)}|dns|ipv4|ipv6|xds|google-c2p):(.+)")
"""What else grpc takes."""

_SHORTEST = 0.001
"""Seconds: grpc is told whole milliseconds."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Calls that end with UNAVAILABLE before anything was received are made again.

    Waiting grows from `first` seconds by `factor` up to `longest`, each drawn within a fifth around
    that; all attempts share the call's timeout.

    Attributes:
      attempts: calls in all, from 1 (no second one) to MAX_ATTEMPTS.
    """

    attempts: int = 5
    first: float = 0.25
    factor: float = 3.0
    longest: float = 10.0

    def __post_init__(self) -> None:
        if type(self.attempts) is not int or not 1 <= self.attempts <= MAX_ATTEMPTS:
            raise InvalidConfig(
                f"attempts: got {self.attempts!r}, must be a whole number from 1 to {MAX_ATTEMPTS}"
            )
        for name in ("first", "factor", "longest"):
            value = getattr(self, name)
            if not checks.is_number(value) or not _SHORTEST <= value <= checks.LONGEST:
                limit = f"a number from {_SHORTEST:g} to {checks.LONGEST:.0f}"
                raise InvalidConfig(f"{name}: got {value!r}, must be {limit}")

    def policy(self) -> dict[str, Any]:
        """As grpc's service config has it (gRFC A6)."""
        return {
            "maxAttempts": self.attempts,
            "initialBackoff": f"{self.first:.3f}s",
            "maxBackoff": f"{self.longest:.3f}s",
            "backoffMultiplier": self.factor,
            "retryableStatusCodes": ["UNAVAILABLE"],
        }


AS_USUAL = Retry()


@dataclass(frozen=True)
class Connection:
    """The arguments of a client, checked, and what grpc makes of them.

    Raises:
      InvalidConfig: names the argument, what it is and what it must be; shows no key.
    """

    address: str
    api_key: str | None = field(repr=False)
    tls: TLS | bool
    timeout: float | None
    retry: Retry
    look_after: float | None

    def __post_init__(self) -> None:
        if not _is_address(self.address):
            limit = "HOST:PORT, or another target of grpc, such as unix:PATH or dns:///HOST:PORT"
            raise InvalidConfig(f"address: got {self.address!r}, must be {limit}")
        if not isinstance(self.tls, (TLS, bool)):
            raise InvalidConfig(f"tls: got {self.tls!r}, must be True, False or quire.client.TLS")
        if not isinstance(self.retry, Retry):
            raise InvalidConfig(f"retry: got {self.retry!r}, must be quire.client.Retry")
        try:
            checks.timeout("timeout", self.timeout)
            checks.timeout("look_after", self.look_after, least=_LOOKS_AT_LEAST)
            if self.api_key is not None:
                checks.key("api_key", self.api_key)
        except InvalidRequest as error:
            raise InvalidConfig(str(error)) from error
        if self.api_key is not None and self.tls is False and not _stays_here(self.address):
            warnings.warn(
                f"the API key goes to {self.address} in plain text, which anybody on the way can "
                "read; use tls",
                stacklevel=4,  # whoever makes the client
            )

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None is plain text. Raises InvalidConfig for a file that is wrong."""
        tls = TLS() if self.tls is True else self.tls
        return tls.credentials() if tls else None

    @property
    def options(self) -> Sequence[tuple[str, Any]]:
        """Of the channel. What is tried again is decided here, and done by grpc."""
        methods = {"name": [{"service": SERVICE}]}
        config = {"methodConfig": [methods | {"retryPolicy": self.retry.policy()}]}
        again = self.retry.attempts > 1
        return [
            ("grpc.enable_retries", int(again)),
            ("grpc.service_config", json.dumps(config if again else {})),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            # What is kept of a call to make it again; grpc's own is 256 KiB, and gives up without a
            # word on requests that are larger.
            ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
            # What a new connection may take; grpc's own is 20 s, for each second attempt of a call.
            ("grpc.min_reconnect_backoff_ms", int(CONNECT_WITHIN * 1000)),
            *self._looks,
        ]

    @property
    def _looks(self) -> Sequence[tuple[str, Any]]:
        """Notices a server that vanished without a word while a call runs."""
        if self.look_after is None:
            return ()
        return (
            ("grpc.keepalive_time_ms", int(self.look_after * 1000)),
            # The second is what counts in newer versions of grpc, whatever its documentation says.
            ("grpc.keepalive_timeout_ms", int(ANSWER_WITHIN * 1000)),
            ("grpc.http2.ping_timeout_ms", int(ANSWER_WITHIN * 1000)),
            # Otherwise the third look would not come before the client itself sends something,
            # which one that reads an answer never does.
            ("grpc.http2.max_pings_without_data", 0),
        )

    def how(self, timeout: float | None, metadata: Metadata) -> dict[str, Any]:
        """Arguments of a call beside its request; raises InvalidRequest.

        Args:
          timeout: seconds; None is the client's.
          metadata: beside the key.
        """
        key = self.api_key
        own = () if key is None else (("authorization", f"Bearer {key}"),)
        seconds = self.timeout if timeout is None else checks.timeout("timeout", timeout)
        return {"timeout": seconds, "metadata": (*own, *checks.metadata(metadata))}


def _is_address(address: Any) -> bool:
    if not isinstance(address, str):
        return False
    found = _HOST_PORT.fullmatch(address)
    return 0 < int(found[2]) < 2**16 if found else bool(_TARGET.fullmatch(address))


def _stays_here(address: str) -> bool:
    """Whether what is sent to an address stays on this machine."""
    target = None if _HOST_PORT.fullmatch(address) else _TARGET.fullmatch(address)
    if target and target[1] in _ON_THIS_MACHINE:
        return True
    hosts = target[2].rpartition("/")[2] if target else address
    return all(is_loopback(host.rpartition(":")[0].strip("[]")) for host in hosts.split(","))
