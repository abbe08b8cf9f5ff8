"""JAX is held to the budget before it starts; nothing here needs a GPU."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from quire.config import EngineConfig
from quire.errors import InvalidConfig
from quire.model import compile, devices
from quire.model.devices import device_memory, gpu_memory, hold_gpu
from quire.model.memory import GIB, PLATFORMS
from quire.model.mesh import default_mesh
from quire.model.sizing import host_memory

TOTAL = 140 * GIB + 12345


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, bool]]:
    """What JAX's pool is asked to be, of a JAX that has not started."""
    calls: list[tuple[float, bool]] = []
    monkeypatch.setattr(devices, "jax_has_started", lambda: False)
    monkeypatch.setattr(devices, "set_pool", lambda share, at_once: calls.append((share, at_once)))
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_pool_is_the_budget_without_what_lies_beside_it(asked: Any) -> None:
    hold_gpu(EngineConfig(memory="6GiB"), TOTAL, wanted=GIB)
    ((share, at_once),) = asked
    assert int(share * TOTAL) == pytest.approx(6 * GIB - PLATFORMS["gpu"].outside, abs=4096)
    assert at_once


@pytest.mark.parametrize(("wanted", "at_once"), [(100 * GIB, True), (10 * GIB, False)])
def test_by_default_90_percent_and_all_at_once_where_it_is_needed(
    asked: Any, wanted: int, at_once: bool
) -> None:
    hold_gpu(EngineConfig(), TOTAL, wanted)
    ((share, whole),) = asked
    assert 0.88 < share < 0.9 and whole is at_once


def test_a_share_in_the_environment_is_kept_and_contradicts_memory(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    hold_gpu(EngineConfig(), TOTAL, GIB)
    assert asked == []
    says = r"memory: is set, and so is XLA_PYTHON_CLIENT_MEM_FRACTION \(0.5\)"
    with pytest.raises(InvalidConfig, match=says):
        hold_gpu(EngineConfig(memory="6GiB"), TOTAL, GIB)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "half")
    with pytest.raises(InvalidConfig, match="got 'half', must be a share of 1"):
        hold_gpu(EngineConfig(), TOTAL, GIB)


def test_a_jax_that_has_started_is_left_alone(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "jax_has_started", lambda: True)
    hold_gpu(EngineConfig(memory="6GiB"), TOTAL, GIB)
    assert asked == []


def test_jax_is_told_in_its_own_settings_and_children_are_not() -> None:
    before = jax.config.values["jax_pjrt_client_create_options"]
    try:
        compile.set_pool(0.25, at_once=True)
        told = jax.config.values["jax_pjrt_client_create_options"]
        assert told == {"memory_fraction": 0.25, "preallocate": True}
    finally:
        jax.config.update("jax_pjrt_client_create_options", before)


def test_on_cpu_the_host_is_the_device() -> None:
    assert gpu_memory() is None  # JAX_PLATFORMS says cpu
    memory = device_memory(default_mesh())
    assert (memory.capacity, memory.pool) == (host_memory(), None)
    assert compile.jax_has_started()
