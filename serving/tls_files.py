"""A server's TLS files, read and checked without grpc.

Used by the parent, before anything is started (supervisor/first_look.py), and by frontends, whose
port follows them (frontend/tls.py).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from ..config import ServerConfig
from ..errors import InvalidConfig


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """In PEM form, each a path.

    Attributes:
      cert: the server's certificate, and after it those that lead to a root.
      key: its private key, without a password.
      client_ca: whose certificates callers must show; None asks them for none.
    """

    cert: str
    key: str
    client_ca: str | None = None

    @classmethod
    def of(cls, settings: ServerConfig) -> TlsFiles | None:
        """Those that the settings name; None where the port is to be without TLS."""
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """What is in them: certificate chain, key, and the callers' authorities.

        Raises:
          InvalidConfig: names the setting whose file is wrong.
        """
        cert, key = _bytes("tls_cert", self.cert), _bytes("tls_key", self.key)
        client_ca = None if self.client_ca is None else _bytes("tls_client_ca", self.client_ca)
        _check(self)
        return cert, key, client_ca


def _bytes(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{name}: {path} cannot be read: {error.strerror}") from error


def _check(files: TlsFiles) -> None:
    """grpc takes any bytes and then fails each handshake; Python's own TLS says what is wrong."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(files.cert)
    except OSError as error:  # of TLS, or the file went away since it was read
        raise InvalidConfig(f"tls_cert: {files.cert} holds no PEM certificate ({error})") from error
    try:
        # A password is asked for on the terminal unless one is given.
        context.load_cert_chain(files.cert, files.key, password="")
    except (OSError, ValueError) as error:
        raise InvalidConfig(
            f"tls_key: {files.key} holds no PEM key without a password that fits {files.cert} "
            f"({error})"
        ) from error
    if files.client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(files.client_ca)
        except OSError as error:
            raise InvalidConfig(
                f"tls_client_ca: {files.client_ca} holds no PEM certificate ({error})"
            ) from error
