"""What `quire doctor` reads off the machine; its checks (doctor_checks.py) judge it.

One frozen record, so that tests can describe any machine.
"""

from __future__ import annotations

import json
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..config import ServerConfig
from ..environment import HubSettings, accelerators_hidden, default_cache_dir, hub_settings
from ..model.hardware import Hardware, find_hardware

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "libtpu",
    "flax",
    "orbax-checkpoint",
    "huggingface-hub",
)

_ASK_JAX = """
import os, json, logging
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
import jax
faults = []
class Faults(logging.Handler):
    def emit(self, record):
        error, text = (record.exc_info or (None, None))[1], record.getMessage()
        if error or "initialize" in text:
            faults.append(" ".join(f"{text}: {error}".split() if error else text.split()))
logging.getLogger("jax").setLevel("INFO")  # how JAX says that it goes on without a backend
logging.getLogger("jax").addHandler(Faults())
devices = [[d.platform, d.device_kind] for d in jax.devices()]
print(json.dumps([devices, [text[:500] for text in faults]]))
"""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A cache: bytes it holds and bytes free beside it."""

    path: Path
    used: int
    free: int
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Machine:
    """This machine and this installation.

    Attributes:
      python: (major, minor, micro).
      system: such as "Linux x86_64".
      packages: version of each installed package of `PACKAGES`.
      hardware: accelerators by the operating system.
      jax_devices: (platform, kind) of each device by JAX, or what JAX said instead.
      jax_faults: what JAX said of the backends that it went on without.
      hidden: what in the environment hides accelerators from JAX.
      memory, memory_free: of the host, in bytes.
      caches: by what they are for.
      ports_taken: (host, port) of those a server would bind by default.
      open_files: how many this process may open.
      hub: the settings; token_stored is whether huggingface_hub finds a token.
    """

    python: tuple[int, int, int]
    system: str
    packages: Mapping[str, str]
    hardware: Hardware
    jax_devices: list[tuple[str, str]] | str
    jax_faults: list[str]
    hidden: str | None
    memory: int
    memory_free: int
    caches: Mapping[str, Folder]
    ports_taken: list[tuple[str, int]]
    open_files: int
    hub: HubSettings
    token_stored: bool


Said = tuple[list[tuple[str, str]] | str, list[str]]
"""What JAX says: `Machine.jax_devices` and `Machine.jax_faults`."""


def this_machine(ask_jax: Callable[[], Said] | None = None) -> Machine:
    """Reads everything; takes as long as JAX takes to start."""
    hub = hub_settings()
    jax_devices, jax_faults = (ask_jax or _ask_jax)()
    total, free = _memory()
    return Machine(
        python=sys.version_info[:3],
        system=f"{platform.system()} {platform.machine()}",
        packages=_packages(),
        hardware=find_hardware(),
        jax_devices=jax_devices,
        jax_faults=jax_faults,
        hidden=accelerators_hidden(),
        memory=total,
        memory_free=free,
        caches={
            "compiled programs": _folder(default_cache_dir()),
            "hub models": _folder(hub.cache),
        },
        ports_taken=_ports_taken(ServerConfig()),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        hub=hub,
        token_stored=_token_stored(),
    )


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _ask_jax() -> Said:
    """Asks in another process: a device that JAX opens here would stay taken."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_JAX], capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired:
        return "did not answer within 180 s", []
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return lines[-1] if lines else f"ended with status {done.returncode}", []
    devices, faults = json.loads(done.stdout.splitlines()[-1])
    return [(kind, name) for kind, name in devices], faults


def _memory() -> tuple[int, int]:
    """Bytes of the host, and those that are free or can be freed."""
    values = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        pass
    total = values.get("MemTotal", 0)
    return total, values.get("MemAvailable", total)


def _folder(path: Path) -> Folder:
    there = path
    while not there.exists():
        there = there.parent
    return Folder(
        path=path,
        used=_bytes_in(path),
        free=shutil.disk_usage(there).free,
        writable=_writable(there),
    )


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            if file.is_file() and not file.is_symlink():
                total += file.stat().st_size
        except OSError:
            continue
    return total


def _writable(folder: Path) -> bool:
    from tempfile import TemporaryFile

    try:
        with TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _ports_taken(server: ServerConfig) -> list[tuple[str, int]]:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except OSError:
            return [(server.host, server.port)]
    return []


def _token_stored() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
