"""TLS and mutual TLS from files, for a frontend's public port.

The files are looked at whenever a caller connects, and read again when they have changed: new
callers get the new certificate, connections that stand keep theirs. Files that do not fit together
(as while they are being replaced one by one) are said once, and the last good ones stay in force.
TLS versions and ciphers are grpc's own: 1.2 at least.
"""

from __future__ import annotations

import logging

import grpc

from ...errors import InvalidConfig
from ..tls_files import TlsFiles
from ..watched_file import Stamp, stamp

log = logging.getLogger(__name__)


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
    cert, key, client_ca = files.read()
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)
