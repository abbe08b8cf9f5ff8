"""`quire serve` as a child process: started, waited for, weighed, stopped. Used by soak.py."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ...errors import Unavailable

_READY = re.compile(r"^ready on (\S+)")
_METRICS = re.compile(r"^metrics on (?:http://)?([^\s/]+)")


class ServerProcess:
    """A server of our own on a port of its own.

    Args:
      argv: of `quire serve`, ports left out.
      log: where what it says goes.

    Attributes:
      address, metrics: HOST:PORT, once ready.
    """

    def __init__(self, argv: Sequence[str], log: Path):
        self.address = self.metrics = ""
        command = [sys.executable, "-P", "-m", "quire.tools.cli", "serve", *argv]
        ports = ["--port=0", "--metrics-port=0"]
        self._log = log
        self._process = subprocess.Popen(
            [*command, *ports], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self._ready = threading.Event()  # or ended
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with open(self._log, "w", encoding="utf-8") as log:
            for line in self._process.stderr:
                log.write(line)
                log.flush()
                if found := _METRICS.match(line):
                    self.metrics = found[1]
                if found := _READY.match(line):
                    self.address = found[1]
                    self._ready.set()
        self._ready.set()

    def wait_ready(self, timeout: float) -> None:
        """Raises Unavailable if it ends, or is not ready after `timeout` seconds."""
        if not self._ready.wait(timeout) or not self.address:
            raise Unavailable(f"the server did not get ready within {timeout:g} s; see {self._log}")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def memory(self) -> dict[int, int]:
        """Bytes resident by process, of the server and its children."""
        found = {}
        for pid in _tree(self._process.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue  # it has just ended
            if line := re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE):
                found[pid] = int(line[1]) << 10
        return found

    def stop(self, timeout: float = 60.0) -> int:
        """Ends it as an operator would; its exit status."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join(5)
        return status


def _tree(root: int) -> list[int]:
    """The process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        parent = int(stat.rpartition(")")[2].split()[1])
        parents.setdefault(parent, []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree += parents.get(pid, [])
    return tree
