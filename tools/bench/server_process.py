"""`quire serve` as a child process: started, waited for, weighed, stopped. Used by soak.py
and online.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import Unavailable

_READY = re.compile(r"^ready on (\S+)")
_DEVICE = re.compile(r" on (cpu|gpu|tpu)(?: \((.+)\))?$")
_METRICS = re.compile(r"^metrics on (?:http://)?([^\s/]+)")


@dataclass(frozen=True, slots=True)
class Weight:
    """What a process holds: bytes resident, files and sockets open."""

    pid: int
    memory: int
    files: int


class ServerProcess:
    """A server of our own on a port of its own.

    Args:
      argv: of `quire serve`, ports left out.
      log: where what it says goes.

    Attributes:
      address, metrics: HOST:PORT, once ready.
      device: platform and kind of what it runs on, such as "gpu" and "NVIDIA H200", once known.
    """

    def __init__(self, argv: Sequence[str], log: Path):
        self.address = self.metrics = ""
        self.device = "", ""
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
                if (found := _DEVICE.search(line)) and not self.device[0]:
                    self.device = found[1], found[2] or found[1]
                if found := _METRICS.match(line):
                    self.metrics = found[1]
                if found := _READY.match(line):
                    self.address = found[1]
                    self._ready.set()
        self._ready.set()

    def wait_ready(self, timeout: float) -> None:
        """Raises Unavailable if it ends, or is not ready after `timeout` seconds."""
        if not self._ready.wait(timeout):
            raise Unavailable(f"the server did not get ready within {timeout:g} s; see {self._log}")
        if not self.address:
            status = self.stop()
            last = "".join(f": {line}" for line in self.log()[-1:])
            raise Unavailable(
                f"the server ended with status {status} before it was ready{last}; see {self._log}"
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def weigh(self) -> dict[str, Weight]:
        """The server's processes by name: parent, engine, frontend, frontend 2, and so on."""
        found: dict[str, Weight] = {}
        for pid in _tree(self._process.pid):
            try:
                weight = _weigh(pid)
                command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue  # it has just ended
            if weight is not None:
                found[_name(command, found)] = weight
        return found

    def log(self) -> list[str]:
        """What it said so far, by lines."""
        return self._log.read_text("utf-8", "replace").splitlines()

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


def _weigh(pid: int) -> Weight | None:
    """None of one that has ended and was not waited for."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    if resident is None:
        return None
    return Weight(pid, int(resident[1]) << 10, len(os.listdir(f"/proc/{pid}/fd")))


def _name(command: Sequence[str], taken: Container[str]) -> str:
    """Of a process, by its command line."""
    parts = {".engine_host.": "engine", ".frontend.": "frontend"}  # of the module that it runs
    found = [name for part, name in parts.items() if any(part in word for word in command)]
    name = found[0] if found else "parent"
    number = 2
    while name in taken:
        name, number = f"{name.partition(' ')[0]} {number}", number + 1
    return name


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
