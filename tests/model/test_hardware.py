"""Accelerators found without JAX, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from quire.model.hardware import Gpu, Hardware, find_hardware

VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 9\nGCC version:"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build\n"


def machine(root: Path, *pci: tuple[str, str, str], **files: str) -> Path:
    """A root with PCI devices (vendor, device, class) and files, `__` in a name standing for /."""
    for i, device in enumerate(pci):
        folder = root / f"sys/bus/pci/devices/0000:00:{i:02}.0"
        folder.mkdir(parents=True)
        for name, text in zip(("vendor", "device", "class"), device, strict=True):
            (folder / name).write_text(text + "\n")
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


H200 = ("0x10de", "0x2335", "0x030200")


def test_a_machine_without_accelerators(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        ("0x1ae0", "0x0042", "0x020000"),  # Google's network card
        ("0x10de", "0x22a3", "0x068000"),  # NVIDIA's switch
        ("0x1af4", "0x1041", "0x020000"),
    )
    found = find_hardware(root, nvidia_smi=lambda: pytest.fail("asked for nothing"))
    assert found == Hardware()
    assert (found.accelerator, found.extra, found.plugins) == (None, None, ())


def test_nvidia_smi_knows_best(tmp_path: Path) -> None:
    root = machine(tmp_path, H200, H200, dev__nvidia0="", dev__nvidiactl="")
    said = "NVIDIA H200, 143771, 580.95.05\nNVIDIA H200, 143771, 580.95.05\n"
    found = find_hardware(root, nvidia_smi=lambda: said)
    assert found.gpus == (Gpu("NVIDIA H200", 143771 << 20),) * 2
    assert (found.driver, found.gpu_nodes, found.accelerator) == ("580.95.05", True, "gpu")
    assert found.describe() == "2 x NVIDIA H200"
    assert found.mend() == "pip install 'quire[cuda13]'"
    assert found.plugins == ("jax-cuda13-plugin", "jax-cuda12-plugin")


@pytest.mark.parametrize("version", [VERSION, OPEN])
def test_the_driver_by_its_files(tmp_path: Path, version: str) -> None:
    root = machine(
        tmp_path,
        H200,
        proc__driver__nvidia__version=version.format("550.54.15"),
        proc__driver__nvidia__gpus__a__information="Model: \t\t NVIDIA L4\nIRQ: 1\n",
    )
    found = find_hardware(root, nvidia_smi=lambda: None)
    assert (found.gpus, found.driver) == ((Gpu("NVIDIA L4"),), "550.54.15")
    assert not found.gpu_nodes
    assert found.mend() == "pip install 'quire[cuda12]'"
    assert found.plugins == ("jax-cuda12-plugin",)


def test_a_gpu_without_a_driver_and_one_with_an_old_one(tmp_path: Path) -> None:
    found = find_hardware(machine(tmp_path, H200), nvidia_smi=lambda: None)
    assert (found.accelerator, found.driver, found.extra) == ("gpu", None, None)
    assert found.mend().startswith("install the NVIDIA driver")
    old = Hardware(gpus=(Gpu("NVIDIA T4"),), driver="470.82.01")
    assert old.extra is None and old.plugins == ()
    assert old.mend() == "update the NVIDIA driver 470.82.01 to 580 or newer"


def test_tpus(tmp_path: Path) -> None:
    chip = ("0x1ae0", "0x006f", "0x120000")
    root = machine(tmp_path, *[chip] * 4, dev__vfio__0="", dev__vfio__vfio="", dev__accel0="")
    found = find_hardware(root, nvidia_smi=lambda: None)
    assert (found.accelerator, found.describe()) == ("tpu", "4 x TPU v6e")
    assert found.tpu_nodes == ("/dev/accel0", "/dev/vfio/0")
    assert (found.mend(), found.plugins) == ("pip install 'quire[tpu]'", ("libtpu",))
