"""What memory the devices have, how JAX is held to a part of it, and what it really took.

Called by serving/assemble.py before and after JAX starts, and by who compares the memory table with
the device (tests, tools/start_check.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import jax

from ..config import EngineConfig
from ..environment import pool_share
from ..errors import InvalidConfig
from .compile import jax_has_started, set_pool
from .memory import CAPACITY_GRAIN, PLATFORMS, MemoryTable
from .mesh import Mesh
from .sizing import host_memory


def gpu_memory() -> int | None:
    """Bytes of the first NVIDIA GPU that this process may use, by its driver; None without one.

    JAX tells only what its own pool may take, and only once that pool is there.
    """
    named = jax.config.jax_platforms  # type: ignore[attr-defined]
    if named and not {"cuda", "gpu"} & set(named.split(",")):
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    if (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    ):
        return None
    return size.value


def hold_gpu(config: EngineConfig, total: int, wanted: int) -> None:
    """Holds JAX's pool on each GPU to the engine's budget, if JAX has not started.

    Args:
      config: says the budget.
      total: the device's memory, from `gpu_memory`.
      wanted: bytes of everything that lives as long as the engine.

    Raises:
      InvalidConfig: the environment tells JAX another share than `memory`.
    """
    told = pool_share()
    if told is not None and config.memory is not None:
        raise InvalidConfig(f"memory: is set, and so is {told[0]} ({told[1]}); set one of them")
    if told is not None or jax_has_started():
        return
    kind, capacity = PLATFORMS["gpu"], total - total % CAPACITY_GRAIN
    budget = config.memory if config.memory is not None else int(capacity * kind.share)
    pool = budget - kind.outside
    # A pool that grows does so in doubling pieces and ends up cut into parts that one slab does not
    # fit in, so it may grow only where there is twice what is wanted.
    set_pool(pool / total, at_once=config.memory is not None or 2 * wanted > pool)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What one device of a mesh has, in bytes: all, and what JAX may take (None: all of it)."""

    capacity: int
    pool: int | None


def device_memory(mesh: Mesh) -> DeviceMemory:
    """Starts JAX. Virtual CPU devices share the host's memory."""
    if mesh.platform == "cpu":
        return DeviceMemory(host_memory() // len(mesh.devices), None)
    limit = int(mesh.devices[0].memory_stats()["bytes_limit"])
    if mesh.platform == "gpu" and (total := gpu_memory()) is not None:
        return DeviceMemory(total, limit)
    return DeviceMemory(limit, None)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one device holds by JAX's statistics, in bytes.

    Attributes:
      in_use: now.
      peak: at most since the process began; None on CPU, where JAX does not say.
      limit: what JAX may take; None on CPU.
    """

    in_use: int
    peak: int | None
    limit: int | None

    @property
    def most(self) -> int:
        return self.in_use if self.peak is None else self.peak


def measured(mesh: Mesh) -> Measured:
    """The memory of the mesh's first device as it is."""
    device = mesh.devices[0]
    stats = device.memory_stats()
    if stats:
        return Measured(stats["bytes_in_use"], stats["peak_bytes_in_use"], stats["bytes_limit"])
    # Copies that share a buffer (an array and its view by another sharding) count once.
    shards = (s for array in jax.live_arrays() for s in _shards(array, device))
    held = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    return Measured(sum(held.values()), None, None)


def _shards(array: jax.Array, device: jax.Device) -> Iterable[jax.Array]:
    return (s.data for s in array.addressable_shards if s.device == device)


def compared(table: MemoryTable, found: Measured) -> float:
    """How far the table is from the device, as a share of the table: above 0 the device took more.

    Without a peak, what programs need while they run is in neither.
    """
    expected = table.pool if found.peak is not None else table.arrays
    return found.most / expected - 1
