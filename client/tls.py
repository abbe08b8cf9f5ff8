"""`TLS`: how a client knows its server, and shows who it is itself. Used by channel.py."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..errors import InvalidConfig


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
        """Raises InvalidConfig for a file that cannot be read, or does not hold what it should."""
        if (self.cert is None) != (self.key is None):
            missing = "cert" if self.cert is None else "key"
            raise InvalidConfig(
                f"{missing}: got none, must be given with the other of cert and key"
            )
        ca, key, cert = _read("ca", self.ca), _read("key", self.key), _read("cert", self.cert)
        self._check()
        return grpc.ssl_channel_credentials(ca, key, cert)

    def _check(self) -> None:
        """grpc takes any bytes and then cannot connect; Python's own TLS says what is wrong."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca is not None:
            try:
                context.load_verify_locations(Path(self.ca).expanduser())
            except ssl.SSLError as error:
                raise InvalidConfig(
                    f"ca: got {str(self.ca)!r}, must hold PEM certificates ({error})"
                ) from error
        if self.cert is not None and self.key is not None:
            cert, key = Path(self.cert).expanduser(), Path(self.key).expanduser()
            try:
                # A password is asked for on the terminal unless one is given.
                context.load_cert_chain(cert, key, password="")
            except (ssl.SSLError, ValueError) as error:
                raise InvalidConfig(
                    f"cert, key: got {str(self.cert)!r} and {str(self.key)!r}, must be a PEM "
                    f"certificate and its PEM key without a password ({error})"
                ) from error


def _read(name: str, file: Path | str | None) -> bytes | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_bytes()
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise InvalidConfig(f"{name}: got {file!r}, must be a readable file: {error}") from error
