"""Which accelerators this machine has, asked of the operating system and not of JAX.

JAX that lacks the right plugin, or a driver, sees a CPU and says little about it.
serving/devices.py compares the two before an engine starts; `quire doctor` shows both.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_NVIDIA, _GOOGLE = "0x10de", "0x1ae0"
_DISPLAY_CLASS = "0x03"
# Google's other PCI devices are network cards and disks of its virtual machines.
_TPUS = {
    "0x0027": "TPU v2 or v3",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU 7x",
}

# The oldest driver that each CUDA release of JAX's runs on.
CUDA13_DRIVER, CUDA12_DRIVER = 580, 525


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU; `memory` in bytes, None where no driver tells."""

    name: str
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """What is there.

    Attributes:
      gpus: NVIDIA GPUs.
      driver: NVIDIA driver version such as "580.95.05"; None where none is loaded.
      gpu_nodes: whether this process could open them (a container may not have been given them).
      tpus: kinds of TPU chips, one entry a chip.
      tpu_nodes: /dev/accel* and /dev/vfio/N.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    gpu_nodes: bool = False
    tpus: tuple[str, ...] = ()
    tpu_nodes: tuple[str, ...] = ()

    @property
    def accelerator(self) -> str | None:
        """ "gpu", "tpu" or None."""
        return "gpu" if self.gpus else "tpu" if self.tpus else None

    @property
    def extra(self) -> str | None:
        """The extra of the `quire` package that this hardware needs; None where there is none,
        or the driver is missing or too old for any."""
        if self.gpus:
            major = int(self.driver.split(".")[0]) if self.driver else 0
            if major >= CUDA13_DRIVER:
                return "cuda13"
            return "cuda12" if major >= CUDA12_DRIVER else None
        return "tpu" if self.tpus else None

    @property
    def plugins(self) -> tuple[str, ...]:
        """The packages of which one gives JAX these devices, the one of `extra` first."""
        if self.extra == "cuda13":
            return ("jax-cuda13-plugin", "jax-cuda12-plugin")
        return {"cuda12": ("jax-cuda12-plugin",), "tpu": ("libtpu",)}.get(self.extra or "", ())

    def describe(self) -> str:
        """Such as "2 x NVIDIA H200"."""
        names = [gpu.name for gpu in self.gpus] or list(self.tpus)
        return ", ".join(
            f"{names.count(name)} x {name}" if names.count(name) > 1 else name
            for name in dict.fromkeys(names)
        )

    def mend(self) -> str:
        """What makes JAX see this hardware, as a person would type it."""
        if self.extra is not None:
            return f"pip install 'quire[{self.extra}]'"
        if self.driver is None:
            return "install the NVIDIA driver (in a container: start it with the GPUs)"
        return f"update the NVIDIA driver {self.driver} to {CUDA13_DRIVER} or newer"


def ask_nvidia_smi() -> str | None:
    """A line "name, memory in MiB, driver" per GPU; None where there is no such program."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def find_hardware(
    root: Path = Path("/"), nvidia_smi: Callable[[], str | None] = ask_nvidia_smi
) -> Hardware:
    """Looks at the PCI bus, the drivers' files under `root`, and what nvidia-smi says."""
    pci = _pci(root)
    gpus = [
        Gpu("NVIDIA GPU") for v, _, kind in pci if v == _NVIDIA and kind.startswith(_DISPLAY_CLASS)
    ]
    driver = None
    models = [_model(file) for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information"))]
    if models:
        gpus = [Gpu(model) for model in models]
    version = _text(root / "proc/driver/nvidia/version")
    if found := re.search(r"NVRM version:.*?\s(\d+(?:\.\d+)+)\s", version):
        driver = found[1]
    nodes = any(root.glob("dev/nvidia[0-9]*")) or (root / "dev/dxg").exists()
    if (gpus or driver or nodes) and (said := nvidia_smi()):
        rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line]
        rows = [row for row in rows if len(row) == 3]
        if rows:
            gpus = [Gpu(name, _mebibytes(memory)) for name, memory, _ in rows]
            driver = rows[0][2]
    tpus = [_TPUS[device] for vendor, device, _ in pci if vendor == _GOOGLE and device in _TPUS]
    tpu_nodes = [*root.glob("dev/accel*"), *root.glob("dev/vfio/[0-9]*")]
    return Hardware(
        gpus=tuple(gpus),
        driver=driver,
        gpu_nodes=nodes,
        tpus=tuple(tpus),
        tpu_nodes=tuple(sorted("/" + str(node.relative_to(root)) for node in tpu_nodes)),
    )


def _pci(root: Path) -> list[tuple[str, str, str]]:
    """(vendor, device, class) of everything on the bus, as the kernel spells them."""
    return [
        (_text(folder / "vendor"), _text(folder / "device"), _text(folder / "class"))
        for folder in sorted(root.glob("sys/bus/pci/devices/*"))
    ]


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _model(file: Path) -> str:
    found = re.search(r"Model:\s*(.+)", _text(file))
    return found[1].strip() if found else "NVIDIA GPU"


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None
