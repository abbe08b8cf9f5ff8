"""The checks of `quire doctor`: each looks at one thing and says what is found and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..model.hardware import CUDA13_DRIVER
from ..model.memory import human_bytes
from .doctor_probes import Machine

OK, WARN, FAIL = "ok", "warn", "fail"

_GIB = 1 << 30
MIN_PYTHON = (3, 11)
MIN_OPEN_FILES = 4096
LITTLE_MEMORY = 4 * _GIB
LITTLE_DISK = 10 * _GIB
NO_DISK = 1 * _GIB


@dataclass(frozen=True, slots=True)
class Check:
    """One result: `found` is what is there; `advice` what to do, empty where all is well."""

    name: str
    status: str
    found: str
    advice: str = ""


def python(m: Machine) -> Iterator[Check]:
    found = f"{'.'.join(map(str, m.python))} on {m.system}"
    if m.python < MIN_PYTHON:
        yield Check("python", FAIL, found, "install Python 3.11 or newer")
    else:
        yield Check("python", OK, found)


def packages(m: Machine) -> Iterator[Check]:
    """JAX and the packages that must be of its version."""
    jax, jaxlib = m.packages.get("jax"), m.packages.get("jaxlib")
    if jax is None or jaxlib is None:
        yield Check("jax", FAIL, f"jax {jax}, jaxlib {jaxlib}", "pip install --upgrade quire")
        return
    same = jax == jaxlib
    yield Check(
        "jax",
        OK if same else FAIL,
        f"jax {jax}, jaxlib {jaxlib}",
        "" if same else f"pip install 'jaxlib=={jax}'",
    )
    for name, found in m.packages.items():
        if name.startswith("jax-cuda"):
            same = found == jaxlib
            advice = "" if same else f"pip install '{name}=={jaxlib}' (that of jaxlib)"
            yield Check(name, OK if same else FAIL, found, advice)
        elif name not in ("jax", "jaxlib"):
            yield Check(name, OK, found)


def accelerator(m: Machine) -> Iterator[Check]:
    """The hardware, its driver and JAX's plugin for it."""
    hardware = m.hardware
    if hardware.accelerator is None:
        yield Check("accelerator", OK, "none: engines run on the CPU")
        return
    yield Check("accelerator", OK, hardware.describe())
    if hardware.gpus:
        yield _driver(m)
        if not hardware.gpu_nodes:
            yield Check(
                "device nodes", FAIL, "no /dev/nvidia*",
                "load the NVIDIA driver; in a container: start it with the GPUs",
            )  # fmt: skip
        sizes = [human_bytes(gpu.memory) for gpu in hardware.gpus if gpu.memory is not None]
        if sizes:
            yield Check("device memory", OK, ", ".join(sizes))
    elif not hardware.tpu_nodes:
        yield Check(
            "device nodes", FAIL, "no /dev/accel* or /dev/vfio/*",
            "in a container: start it with --privileged, or with those devices",
        )  # fmt: skip
    yield _plugin(m)


def _driver(m: Machine) -> Check:
    driver, extra = m.hardware.driver, m.hardware.extra
    if driver is None or extra is None:
        return Check("driver", FAIL, driver or "none is loaded", m.hardware.mend())
    if extra == "cuda12" and "jax-cuda13-plugin" in m.packages:
        return Check(
            "driver", FAIL, f"{driver}, too old for CUDA 13",
            f"update it to {CUDA13_DRIVER} or newer, or: pip uninstall jax-cuda13-plugin "
            f"jax-cuda13-pjrt, then {m.hardware.mend()}",
        )  # fmt: skip
    runs = "CUDA 12 and 13" if extra == "cuda13" else "CUDA 12"
    return Check("driver", OK, f"{driver} (runs {runs})")


def _plugin(m: Machine) -> Check:
    """Whether a JAX package for this hardware is installed."""
    for package in m.hardware.plugins:
        if package in m.packages:
            return Check("JAX plugin", OK, f"{package} {m.packages[package]}")
    return Check("JAX plugin", FAIL, "JAX is installed for CPU alone", m.hardware.mend())


def devices(m: Machine) -> Iterator[Check]:
    """What JAX really opens, against what is there."""
    if isinstance(m.jax_devices, str):
        yield Check(
            "JAX devices", FAIL, f"JAX does not start: {m.jax_devices}",
            "see the lines above; python -c 'import jax; print(jax.devices())' says it all",
        )  # fmt: skip
        return
    kinds = [kind for _, kind in m.jax_devices]
    found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    on_cpu = all(platform == "cpu" for platform, _ in m.jax_devices)
    if on_cpu and m.hardware.accelerator is not None:
        if m.hidden:
            yield Check(
                "JAX devices",
                WARN,
                f"{found}, as {m.hidden} says",
                "unset it to use the accelerator",
            )
        else:
            found = f"{found}, though an accelerator is there"
            yield Check("JAX devices", FAIL, ". ".join([found, *_faults(m)]), m.hardware.mend())
    else:
        yield Check("JAX devices", OK, found)


def _faults(m: Machine) -> list[str]:
    """What JAX said of this hardware's backend: packages may bring backends for other hardware."""
    word = "cuda" if m.hardware.gpus else "tpu"
    return [fault for fault in m.jax_faults if word in fault.lower()]


def memory(m: Machine) -> Iterator[Check]:
    found = f"{human_bytes(m.memory_free)} free of {human_bytes(m.memory)}"
    if m.memory_free < LITTLE_MEMORY:
        yield Check("host memory", WARN, found, "small models alone fit; free some memory")
    else:
        yield Check("host memory", OK, found)


def caches(m: Machine) -> Iterator[Check]:
    for name, folder in m.caches.items():
        found = f"{folder.path}: {human_bytes(folder.used)} used, {human_bytes(folder.free)} free"
        if not folder.writable:
            yield Check(f"cache of {name}", FAIL, f"{folder.path}: cannot be written", _OTHER_CACHE)
        elif folder.free < NO_DISK:
            yield Check(f"cache of {name}", FAIL, found, _OTHER_CACHE)
        elif folder.free < LITTLE_DISK:
            yield Check(f"cache of {name}", WARN, found, _OTHER_CACHE)
        else:
            yield Check(f"cache of {name}", OK, found)


_OTHER_CACHE = "make room, or name another folder (--cache-dir; HF_HOME for the hub)"


def ports(m: Machine) -> Iterator[Check]:
    if m.ports_taken:
        taken = ", ".join(f"{host}:{port}" for host, port in m.ports_taken)
        advice = "end what listens there, or `quire serve --port N`"
        yield Check("ports", WARN, f"taken: {taken}", advice)
    else:
        yield Check("ports", OK, "free")


def open_files(m: Machine) -> Iterator[Check]:
    found = str(m.open_files) if m.open_files >= 0 else "unlimited"
    if 0 <= m.open_files < MIN_OPEN_FILES:
        advice = f"a server holds one per stream: ulimit -n {16 * MIN_OPEN_FILES}"
        yield Check("open files", WARN, found, advice)
    else:
        yield Check("open files", OK, found)


def hub(m: Machine) -> Iterator[Check]:
    token = (
        "HF_TOKEN is set" if m.hub.token else "a token is stored" if m.token_stored else "no token"
    )
    mode = ", offline" if m.hub.offline else ""
    yield Check("hub", OK, f"{m.hub.shown_endpoint}{mode}, {token}")


CHECKS: tuple[Callable[[Machine], Iterator[Check]], ...] = (
    python,
    packages,
    accelerator,
    devices,
    memory,
    caches,
    ports,
    open_files,
    hub,
)


def all_checks(m: Machine) -> list[Check]:
    return [result for check in CHECKS for result in check(m)]
