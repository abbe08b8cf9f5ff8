"""Where arrays live: logical axis names to mesh axes. One device is the plain case of a mesh.

Every weight, slab and slot array names its dimensions ("vocab", "heads", "mlp", ...); the rules
here say which mesh axis, if any, splits each. Changing how a model is spread over devices changes
this table and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.sharding import Mesh as JaxMesh

from ..errors import InvalidConfig

TENSOR = "tensor"
"""The mesh axis over which a model is cut; collectives in the decoder name it."""

RULES: dict[str, str | None] = {
    "vocab": TENSOR,
    "qkv": TENSOR,  # rows of q, k and v, each device's together (model/parallel.py)
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "gate_up": TENSOR,  # rows of gate and up, likewise
    "mlp": TENSOR,
    "embed": None,
    "slots": None,
}


class Mesh:
    """The devices of one engine and the placement of arrays on them."""

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices = tuple(devices)
        self._mesh = JaxMesh(np.array(self.devices), (TENSOR,))

    @property
    def shards(self) -> int:
        """Over how many devices a model is cut."""
        return len(self.devices)

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        platform = str(self.devices[0].platform)
        return "gpu" if platform in ("cuda", "rocm") else platform

    @property
    def lowering_platforms(self) -> tuple[str, ...]:
        """What `Traced.lower` calls this platform."""
        return ("cuda",) if self.platform == "gpu" else (self.platform,)

    @property
    def abstract(self) -> AbstractMesh:
        """The mesh without its devices."""
        return self._mesh.abstract_mesh

    def of(self, axes: Sequence[str | None]) -> NamedSharding:
        """Placement of an array whose dimensions have these logical names."""
        spec = PartitionSpec(*(RULES[a] if a is not None else None for a in axes))
        return NamedSharding(self._mesh, spec)

    def split(self, program: Callable[..., Any], in_axes: Any, out_axes: Any) -> Callable[..., Any]:
        """`program` run by every device on its own share of each array.

        Args:
          program: sees local shapes, and may use collectives over TENSOR.
          in_axes, out_axes: shardings of its arguments and results, as trees of NamedSharding.
        """
        if self.shards == 1:
            return program
        specs = jax.tree.map(lambda sharding: sharding.spec, (in_axes, out_axes))
        return jax.shard_map(
            program, mesh=self._mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )

    @property
    def everywhere(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self._mesh, PartitionSpec())


def default_mesh(tensor_parallel: int = 1, platform: str = "auto") -> Mesh:
    """The first devices of a platform.

    Args:
      tensor_parallel: how many.
      platform: "cpu", "gpu" or "tpu"; "auto" is JAX's default backend.

    Raises:
      InvalidConfig: there are fewer, or none.
    """
    devices = jax.devices() if platform == "auto" else _devices_of(platform)
    if tensor_parallel > len(devices):
        raise InvalidConfig(
            f"tensor_parallel: got {tensor_parallel}, must be at most {len(devices)}: the "
            f"{devices[0].platform} devices there are"
        )
    return Mesh(devices[:tensor_parallel])


def _devices_of(platform: str) -> list[jax.Device]:
    """The devices of one platform; JAX starts no other, unless it has already."""
    before = jax.config.jax_platforms  # type: ignore[attr-defined]
    name = "cuda" if platform == "gpu" else platform
    jax.config.update("jax_platforms", "cpu" if platform == "cpu" else f"{name},cpu")
    try:
        return jax.devices(platform)
    except RuntimeError as error:
        jax.config.update("jax_platforms", before)
        raise InvalidConfig(
            f"platform: got {platform!r}, but JAX has no such device here "
            f"({str(error).splitlines()[0]}); `quire doctor` says why"
        ) from error
