"""The devices of an engine: those the user asked for, and never a CPU that nobody asked for.

Used by assemble.py and `quire inspect`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ..config import EngineConfig
from ..environment import accelerators_hidden
from ..errors import InvalidConfig
from ..model.hardware import Hardware, find_hardware
from ..model.mesh import Mesh, default_mesh
from .progress import Reporter


def open_mesh(config: EngineConfig, reporter: Reporter) -> Mesh:
    """The devices that `config` asks for; says so where that is a CPU.

    Raises:
      InvalidConfig: they are not there, or this machine has an accelerator that JAX does not see.
    """
    try:
        mesh = default_mesh(config.tensor_parallel, config.platform)
    except InvalidConfig as error:
        hardware = find_hardware()
        if hardware.accelerator == config.platform and not _plugin(hardware):
            raise InvalidConfig(f"{error}; to mend that: {hardware.mend()}") from error
        raise
    if mesh.platform != "cpu":
        return mesh
    if config.platform == "cpu":
        reporter.note("runs on the CPU, as platform=cpu says")
    elif hidden := accelerators_hidden():
        reporter.note(f"runs on the CPU, as {hidden} says")
    else:
        hardware = find_hardware()
        if hardware.accelerator is not None:
            raise InvalidConfig(unseen(hardware))
        reporter.note("runs on the CPU: this machine has no GPU or TPU that Quire knows")
    return mesh


def unseen(hardware: Hardware) -> str:
    """Why an engine does not start on a machine with this hardware, and what to do."""
    found = f"found {hardware.describe()}, but JAX runs on the CPU"
    plugin = _plugin(hardware)
    if plugin is not None:
        cause = f"although {plugin} is installed: `quire doctor` says more"
    else:
        cause = f"to mend that: {hardware.mend()}"
    return f"{found}; {cause}. To run on the CPU all the same: --platform cpu"


def _plugin(hardware: Hardware) -> str | None:
    """The installed package that gives JAX these devices, with its version."""
    return next(filter(None, map(_installed, hardware.plugins)), None)


def _installed(package: str) -> str | None:
    """The package with its version; None where it is missing."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None
