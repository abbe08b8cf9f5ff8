"""How a client connects: address, TLS, key, and what is tried again. Used by both clients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from ..errors import InvalidConfig
from ..protos.v1 import generation_pb2 as pb

SERVICE: str = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

MAX_ATTEMPTS = 5
"""What grpc allows at most."""

_MAX_MESSAGE_BYTES = 256 << 20
"""Of an answer; log-probabilities of a long one take more than grpc's 4 MB."""

Metadata = tuple[tuple[str, str], ...]


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
        if not 1 <= self.attempts <= MAX_ATTEMPTS:
            raise InvalidConfig(f"attempts: got {self.attempts}, must be from 1 to {MAX_ATTEMPTS}")
        for name in ("first", "factor", "longest"):
            if not getattr(self, name) > 0:
                raise InvalidConfig(f"{name}: got {getattr(self, name)}, must be above 0")

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


@dataclass(frozen=True, slots=True)
class TLS:
    """Files of PEM.

    Attributes:
      ca: who may vouch for the server; None takes those that the system trusts.
      cert, key: the client's own, where the server asks for it; both or neither.
    """

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises InvalidConfig for a file that cannot be read."""
        if (self.cert is None) != (self.key is None):
            missing = "cert" if self.cert is None else "key"
            raise InvalidConfig(
                f"{missing}: got none, must be given with the other of cert and key"
            )
        return grpc.ssl_channel_credentials(
            _read("ca", self.ca), _read("key", self.key), _read("cert", self.cert)
        )


def _read(name: str, file: Path | str | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_bytes()
    except OSError as error:
        raise InvalidConfig(
            f"{name}: got {str(file)!r}, must be a readable file: {error}"
        ) from error


def options(retry: Retry) -> Sequence[tuple[str, Any]]:
    """Of the channel."""
    methods = {"name": [{"service": SERVICE}]}
    config = {"methodConfig": [methods | {"retryPolicy": retry.policy()}]}
    return [
        ("grpc.enable_retries", int(retry.attempts > 1)),
        ("grpc.service_config", json.dumps(config if retry.attempts > 1 else {})),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        # Notices a server that vanished without a word while a call runs.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def credentials(tls: TLS | bool) -> grpc.ChannelCredentials | None:
    """None is plain text."""
    if isinstance(tls, bool):
        return TLS().credentials() if tls else None
    return tls.credentials()


def key_metadata(api_key: str | None) -> Metadata:
    """What says who calls."""
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)
