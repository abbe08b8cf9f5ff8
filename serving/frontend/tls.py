"""TLS and mutual TLS from files, for a frontend's public port.

The files are looked at whenever a caller connects, and read again when they have changed: new
callers get the new certificate, connections that stand keep theirs. Files that do not fit together
(as while they are being replaced one by one) are said once, and the last good ones stay in force.
TLS versions and ciphers are grpc's own: 1.2 at least.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from ...errors import InvalidConfig
from ..watched_file import Stamp, stamp

log = logging.getLogger(__name__)


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


class _Reader:
    """What grpc asks whenever a caller connects."""

    def __init__(self, files: TlsFiles):
        self._files = files
        self._seen = self._stamps()
        self.first = _read(files)

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """New certificates, or None: the last ones stay. On one of grpc's threads."""
        now = self._stamps()
        if now == self._seen:
            return None
        self._seen = now
        try:
            made = _read(self._files)
        except InvalidConfig as error:
            log.error("%s; the TLS files from before stay in force", error)
            return None
        log.info("the TLS files were read again")
        return made

    def _stamps(self) -> list[Stamp]:
        files = self._files
        return [stamp(path) for path in (files.cert, files.key, files.client_ca) if path]


def tls_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials for a server's port, which follow the files.

    Raises:
      InvalidConfig: names the setting whose file is wrong.
    """
    reader = _Reader(files)
    return grpc.dynamic_ssl_server_credentials(
        reader.first,
        reader,  # type: ignore[arg-type]  # the type stubs know no None, which keeps the last
        require_client_authentication=files.client_ca is not None,
    )


def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    cert, key = _bytes("tls_cert", files.cert), _bytes("tls_key", files.key)
    client_ca = None if files.client_ca is None else _bytes("tls_client_ca", files.client_ca)
    _check(files)
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


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
    except ssl.SSLError as error:
        raise InvalidConfig(f"tls_cert: {files.cert} holds no PEM certificate ({error})") from error
    try:
        # A password is asked for on the terminal unless one is given.
        context.load_cert_chain(files.cert, files.key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise InvalidConfig(
            f"tls_key: {files.key} holds no PEM key without a password that fits {files.cert} "
            f"({error})"
        ) from error
    if files.client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise InvalidConfig(
                f"tls_client_ca: {files.client_ca} holds no PEM certificate ({error})"
            ) from error
