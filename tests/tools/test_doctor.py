"""`quire doctor` on made-up machines, and on this one."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from quire.config import ServerConfig
from quire.environment import HubSettings
from quire.model.hardware import Gpu, Hardware
from quire.tools import doctor_probes
from quire.tools.cli import main
from quire.tools.doctor_checks import Check, all_checks
from quire.tools.doctor_probes import Folder, Machine

GIB = 1 << 30
H200 = Hardware(gpus=(Gpu("NVIDIA H200", 141 * GIB),), driver="580.95.05", gpu_nodes=True)
CACHE = Folder(path=Path("/cache"), used=5, free=100 * GIB, writable=True)
CPU = [("cpu", "cpu")]
ON_GPU = [("gpu", "NVIDIA H200")]
BASE = {"jax": "0.11.2", "jaxlib": "0.11.2"}
CUDA13 = BASE | {"jax-cuda13-plugin": "0.11.2", "jax-cuda13-pjrt": "0.11.2"}
CUDA12 = BASE | {"jax-cuda12-plugin": "0.11.2"}

PLAIN = Machine(
    python=(3, 12, 3),
    system="Linux x86_64",
    packages=BASE,
    hardware=Hardware(),
    jax_devices=CPU,
    jax_faults=["Unable to initialize backend 'tpu': no such thing"],
    hidden=None,
    memory=64 * GIB,
    memory_free=60 * GIB,
    caches={"hub models": CACHE},
    ports_taken=[],
    open_files=65536,
    hub=HubSettings(endpoint="https://hub", token="hf_secret", cache=Path("/cache"), offline=False),
    token_stored=True,
)


def results(**changes: Any) -> dict[str, Check]:
    return {check.name: check for check in all_checks(dataclasses.replace(PLAIN, **changes))}


def test_a_password_of_the_hub_is_not_shown() -> None:
    hub = dataclasses.replace(PLAIN.hub, endpoint="https://me:hush@it@hub/x")
    assert results(hub=hub)["hub"].found.startswith("https://***@hub/x,")


def failing(**changes: Any) -> dict[str, Check]:
    """Those that are not ok."""
    return {name: check for name, check in results(**changes).items() if check.status != "ok"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hardware": H200, "packages": CUDA13, "jax_devices": ON_GPU},
        {"hardware": H200, "packages": CUDA12, "jax_devices": ON_GPU},
        {
            "hardware": Hardware(tpus=("TPU v6e",), tpu_nodes=("/dev/vfio/0",)),
            "packages": BASE | {"libtpu": "0.0.52"},
            "jax_devices": [("tpu", "TPU v6 lite")],
        },
    ],
)
def test_sound_machines(changes: dict[str, Any]) -> None:
    found = results(**changes)
    assert all(check.status == "ok" and not check.advice for check in found.values()), found
    assert {"python", "jax", "accelerator", "JAX devices", "host memory", "ports"} <= found.keys()
    if "hardware" not in changes:
        assert found["accelerator"].found == "none: engines run on the CPU"
    assert "hf_secret" not in repr(found) and "HF_TOKEN is set" in found["hub"].found


OLD = dataclasses.replace(H200, driver="550.54.15")


@pytest.mark.parametrize(
    ("changes", "name", "status", "said"),
    [
        ({"python": (3, 10, 1)}, "python", "fail", "install Python 3.11"),
        ({"packages": {"jax": "0.11.2"}}, "jax", "fail", "pip install"),
        ({"packages": BASE | {"jaxlib": "0.10.2"}}, "jax", "fail", "pip install 'jaxlib==0.11.2'"),
        (
            {"packages": CUDA13 | {"jax-cuda13-plugin": "0.10.2"}},
            "jax-cuda13-plugin", "fail", "pip install 'jax-cuda13-plugin==0.11.2'",
        ),
        ({"hardware": H200}, "JAX plugin", "fail", "pip install 'quire[cuda13]'"),
        ({"hardware": H200}, "JAX devices", "fail", "pip install 'quire[cuda13]'"),
        ({"hardware": OLD}, "JAX plugin", "fail", "pip install 'quire[cuda12]'"),
        ({"hardware": OLD, "packages": CUDA13}, "driver", "fail", "update it to 580 or newer, or:"),
        (
            {"hardware": dataclasses.replace(H200, driver="470.1"), "packages": CUDA12},
            "driver", "fail", "update the NVIDIA driver 470.1 to 580",
        ),
        (
            {"hardware": dataclasses.replace(H200, driver=None), "packages": CUDA13},
            "driver", "fail", "install the NVIDIA driver",
        ),
        (
            {"hardware": dataclasses.replace(H200, gpu_nodes=False), "packages": CUDA13},
            "device nodes", "fail", "in a container: start it with the GPUs",
        ),
        ({"hardware": Hardware(tpus=("TPU v5e",))}, "device nodes", "fail", "--privileged"),
        ({"hardware": Hardware(tpus=("TPU v5e",))}, "JAX plugin", "fail", "quire[tpu]"),
        (
            {"hardware": H200, "packages": CUDA13, "hidden": "JAX_PLATFORMS=cpu"},
            "JAX devices", "warn", "unset it",
        ),
        (
            {"hardware": H200, "packages": CUDA13, "jax_faults": ["tpu: no", "cuda13: no cuDNN"]},
            "JAX devices", "fail", "though an accelerator is there. cuda13: no cuDNN pip install",
        ),
        ({"jax_devices": "no libcuda"}, "JAX devices", "fail", "JAX does not start: no libcuda"),
        ({"memory_free": GIB}, "host memory", "warn", "1 GiB free of 64 GiB"),
        (
            {"caches": {"x": dataclasses.replace(CACHE, writable=False)}},
            "cache of x", "fail", "name another folder",
        ),
        (
            {"caches": {"x": dataclasses.replace(CACHE, free=GIB // 2)}},
            "cache of x", "fail", "512 MiB free",
        ),
        ({"caches": {"x": dataclasses.replace(CACHE, free=5 * GIB)}}, "cache of x", "warn", "5 B"),
        ({"ports_taken": [("127.0.0.1", 50051)]}, "ports", "warn", "127.0.0.1:50051"),
        ({"open_files": 256}, "open files", "warn", "ulimit -n 65536"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_to_do(
    changes: dict[str, Any], name: str, status: str, said: str
) -> None:
    check = failing(**changes)[name]
    assert check.status == status and said in f"{check.found} {check.advice}" and check.advice


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "quire").mkdir()
    (tmp_path / "quire" / "program").write_bytes(b"12345")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = dataclasses.replace(ServerConfig(), port=taken.getsockname()[1])
        monkeypatch.setattr(doctor_probes, "ServerConfig", lambda: server)
        machine = doctor_probes.this_machine(ask_jax=lambda: (CPU, []))
        assert machine.ports_taken == [("127.0.0.1", server.port)]
    assert machine.caches["compiled programs"].used == 5
    assert machine.caches["hub models"].path == tmp_path / "hf" / "hub"
    assert all(folder.writable and folder.free for folder in machine.caches.values())
    assert {"jax", "jaxlib", "orbax-checkpoint"} <= machine.packages.keys()
    assert 0 < machine.memory_free <= machine.memory
    assert doctor_probes._ports_taken(dataclasses.replace(server, port=0)) == []


def test_jax_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_probes._ask_jax() == (CPU, [])
    monkeypatch.setattr(doctor_probes, "_ASK_JAX", "raise RuntimeError('no such plugin')")
    assert doctor_probes._ask_jax() == ("RuntimeError: no such plugin", [])


PLUGIN = """
import jax
def broken(*_, **__):
    raise RuntimeError("driver too old\\nfor this")
def initialize():
    if {late}:
        jax._src.xla_bridge.register_backend_factory("cuda", broken, fail_quietly=True)
    else:
        broken()
"""


@pytest.mark.parametrize("late", [False, True])
def test_why_jax_goes_on_without_a_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: bool
) -> None:
    """A plugin that fails when it is loaded, and one whose backend does not start."""
    (tmp_path / "cudalike.py").write_text(PLUGIN.format(late=late))
    info = tmp_path / "cudalike-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cudalike\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[jax_plugins]\ncudalike = cudalike\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("JAX_PLATFORMS")
    visible = "jax._src.hardware_utils.has_visible_nvidia_gpu = lambda: True"
    ask = doctor_probes._ASK_JAX.replace("import jax\n", f"import jax\n{visible}\n")
    monkeypatch.setattr(doctor_probes, "_ASK_JAX", ask)
    devices, faults = doctor_probes._ask_jax()
    assert devices == CPU
    assert any("cuda" in fault and "driver too old for this" in fault for fault in faults)


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def on(machine: Machine) -> None:
        monkeypatch.setattr(doctor_probes, "this_machine", lambda: machine)

    on(PLAIN)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["checks"][0] == {
        "name": "python", "status": "ok", "found": "3.12.3 on Linux x86_64", "advice": "",
    }  # fmt: skip
    on(dataclasses.replace(PLAIN, open_files=9))
    assert main(["doctor"]) == 0  # a warning is no failure
    assert "→ a server holds one per stream: ulimit -n 65536" in capsys.readouterr().out
    on(dataclasses.replace(PLAIN, hardware=H200))
    assert main(["doctor"]) == 1
    said = capsys.readouterr()
    assert "→ pip install 'quire[cuda13]'" in said.out
    assert said.err == "quire: 2 of 12 checks failed: pip install 'quire[cuda13]'\n"
    assert main(["doctor", "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["ok"]
