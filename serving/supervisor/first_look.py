"""What can be found wrong with a server's files before any of its processes is started.

Called by the supervisor: a mistake in one of them is said at once, and no device is touched for it.
The processes read the files again when they start, and say so themselves if they broke meanwhile.
"""

from __future__ import annotations

from pathlib import Path

from ...config import ServerConfig
from ...errors import InvalidConfig
from ..auth.key_file import read_keys
from ..tls_files import TlsFiles


def check_files(settings: ServerConfig) -> None:
    """Raises InvalidConfig for a file of API keys or a TLS file that cannot be used."""
    for name in ("api_keys", "tls_cert", "tls_key", "tls_client_ca"):
        path = getattr(settings, name)
        if path is not None and Path(path).is_fifo():  # each process reads it, and again
            raise InvalidConfig(f"{name}: {path} is a pipe, must be a file")
    if settings.api_keys is not None:
        read_keys(settings.api_keys)
    if files := TlsFiles.of(settings):
        files.read()
