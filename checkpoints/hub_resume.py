"""Large files of the hub, so that a download that was ended goes on where it stopped. Used by
hub.py.

huggingface_hub goes on within a file while it runs, but what it has of one goes with its process
(https://github.com/huggingface/huggingface_hub/issues/4196). So the files whose SHA-256 the hub
tells are brought here, by its own function: into a file beside the place in its cache where it
looks for them, under its own lock, and moved there when the checksum is right.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ..environment import without_secrets
from ..errors import CheckpointError

_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class LargeFile:
    """A file to bring.

    Attributes:
      url: where it is.
      blob: where it goes; named by its SHA-256, as huggingface_hub names such files.
      lock: the file that whoever brings it holds.
      size: in bytes.
    """

    url: str
    blob: Path
    lock: Path
    size: int

    @property
    def partial(self) -> Path:
        """What is there of it while it is not whole."""
        return self.blob.with_name(f"{self.blob.name}.quire.incomplete")

    @property
    def missing(self) -> int:
        """Bytes that have yet to come."""
        if self.blob.exists():
            return 0
        there = self.partial.stat().st_size if self.partial.exists() else 0
        return self.size - min(there, self.size)


def bring(files: Sequence[LargeFile], headers: dict[str, str]) -> None:
    """Downloads what is missing of the files.

    Args:
      files: several at once are brought.
      headers: of each request.

    Raises:
      CheckpointError: what came is not what the hub says it is.
      Exception: those of huggingface_hub. What came before stays for the next time.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(_AT_ONCE, "quire-download") as pool:
        try:
            for ended in as_completed([pool.submit(_bring, f, headers, stop) for f in files]):
                ended.result()
        except BaseException:  # a fault or an interrupt ends the others: the next time goes on
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _bring(file: LargeFile, headers: dict[str, str], stop: threading.Event) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    file.blob.parent.mkdir(parents=True, exist_ok=True)
    file.lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(file.lock):
        if file.blob.exists():  # somebody else was faster
            return
        with _Partial(file.partial, stop) as partial:
            there = partial.tell()
            if there > file.size:  # of no use
                partial.truncate(0)
                there = 0
            http_get(file.url, partial, resume_size=there, headers=headers, expected_size=file.size)
        if _sha256(file.partial) != file.blob.name:
            file.partial.unlink()
            raise CheckpointError(
                f"{without_secrets(file.url)}: what came has another checksum than the hub says; "
                "run it again"
            )
        os.replace(file.partial, file.blob)


class _Partial(io.BufferedWriter):
    """A file that is added to, until somebody says stop."""

    def __init__(self, path: Path, stop: threading.Event) -> None:
        super().__init__(io.FileIO(path, "a"))
        self.seek(0, io.SEEK_END)
        self._stop = stop

    def write(self, data: object) -> int:
        if self._stop.is_set():
            raise InterruptedError("the download was ended")
        return super().write(data)  # type: ignore[arg-type]  # whatever is a buffer


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
