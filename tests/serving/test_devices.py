"""Never silently on the CPU: which devices an engine takes, and what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quire import LLM, EngineConfig
from quire.errors import InvalidConfig
from quire.model.hardware import Gpu, Hardware
from quire.serving import devices
from quire.serving.devices import open_mesh
from quire.serving.progress import Silent

H200 = Hardware(gpus=(Gpu("NVIDIA H200"),), driver="580.95.05", gpu_nodes=True)
NONE = Hardware()


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of somebody who set nothing. (JAX itself has read JAX_PLATFORMS=cpu.)"""
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("NVIDIA_VISIBLE_DEVICES", raising=False)


def has(monkeypatch: pytest.MonkeyPatch, hardware: Hardware, *installed: str) -> None:
    monkeypatch.setattr(devices, "find_hardware", lambda: hardware)
    monkeypatch.setattr(devices, "_installed", lambda p: f"{p} 1" if p in installed else None)


@pytest.mark.parametrize(
    ("hardware", "line"),
    [
        (H200, "found NVIDIA H200, but JAX runs on the CPU; to mend that: "
               "pip install 'quire[cuda13]'. To run on the CPU all the same: --platform cpu"),
        (Hardware(gpus=(Gpu("NVIDIA L4"),), driver="550.54.15"), r"pip install 'quire[cuda12]'"),
        (Hardware(gpus=(Gpu("NVIDIA L4"),), driver="470.1"), "update the NVIDIA driver 470.1 to"),
        (Hardware(gpus=(Gpu("NVIDIA L4"),)), "install the NVIDIA driver"),
        (Hardware(tpus=("TPU v5e",)), "pip install 'quire[tpu]'"),
    ],
)  # fmt: skip
def test_an_accelerator_that_jax_does_not_see_stops_everything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hardware: Hardware, line: str
) -> None:
    has(monkeypatch, hardware)
    with pytest.raises(InvalidConfig) as caught:
        open_mesh(EngineConfig(), Silent())
    assert line in str(caught.value)
    with pytest.raises(InvalidConfig) as caught:
        LLM("demo", cache_dir=str(tmp_path))
    assert line in str(caught.value)


def test_an_installed_plugin_is_not_advised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, H200, "jax-cuda12-plugin")
    with pytest.raises(InvalidConfig, match="although jax-cuda12-plugin 1 is installed: `quire"):
        open_mesh(EngineConfig(), Silent())


def test_a_platform_asked_for_without_its_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(count: int, platform: str) -> None:
        raise InvalidConfig(f"platform: got {platform!r}, but JAX has no such device here")

    monkeypatch.setattr(devices, "default_mesh", none)
    for installed, hardware, mended in (
        ((), H200, True),
        (("jax-cuda13-plugin",), H200, False),
        ((), NONE, False),
    ):
        has(monkeypatch, hardware, *installed)
        with pytest.raises(InvalidConfig, match="no such device here") as caught:
            open_mesh(EngineConfig(platform="gpu"), Silent())
        assert str(caught.value).endswith("; to mend that: pip install 'quire[cuda13]'") is mended


def test_the_cpu_is_taken_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, H200)
    reporter = Notes()
    assert open_mesh(EngineConfig(platform="cpu"), reporter).platform == "cpu"
    assert reporter.said == ["runs on the CPU, as platform=cpu says"]
    for name, value in (
        ("JAX_PLATFORMS", "cpu"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("NVIDIA_VISIBLE_DEVICES", "void"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            reporter = Notes()
            assert open_mesh(EngineConfig(), reporter).platform == "cpu"
            assert reporter.said == [f"runs on the CPU, as {name}={value} says"]
    for name, value in (("JAX_PLATFORMS", "cuda,cpu"), ("CUDA_VISIBLE_DEVICES", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(InvalidConfig, match="found NVIDIA H200"):
                open_mesh(EngineConfig(), Silent())


def test_a_machine_without_accelerators_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, NONE)
    reporter = Notes()
    assert open_mesh(EngineConfig(), reporter).platform == "cpu"
    assert reporter.said == ["runs on the CPU: this machine has no GPU or TPU that Quire knows"]


def test_a_platform_that_is_not_there_is_refused() -> None:
    """In a process of its own: which platforms JAX starts is settled once in each."""
    script = (
        "import jax\n"
        "from quire.config import EngineConfig\n"
        "from quire.model.mesh import default_mesh\n"
        "from quire.errors import InvalidConfig\n"
        "try: default_mesh(1, 'tpu')\n"
        "except InvalidConfig as error: print(error)\n"
        "print(default_mesh(1, 'cpu').platform, jax.config.jax_platforms)\n"
    )
    argv = [sys.executable, "-P", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    refused, served = done.stdout.splitlines()
    assert refused.startswith("platform: got 'tpu', but JAX has no such device here")
    assert refused.endswith("; `quire doctor` says why")
    assert served == "cpu cpu"
    with pytest.raises(InvalidConfig, match="platform: got 'cuda', must be one of auto, cpu, gpu"):
        EngineConfig(platform="cuda")
