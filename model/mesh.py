"""Where arrays live: logical axis names to mesh axes. One device is the plain case of a mesh.

Every weight, slab and slot array names its dimensions ("vocab", "heads", "mlp", ...); the rules
here say which mesh axis, if any, splits each. Changing how a model is spread over devices changes
this table and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.sharding import Mesh as JaxMesh

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": None,
    "slots": None,
}


class Mesh:
    """The devices of one engine and the placement of arrays on them."""

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices = tuple(devices)
        self._mesh = JaxMesh(np.array(self.devices), ("tensor",))

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

    @property
    def everywhere(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self._mesh, PartitionSpec())


def default_mesh() -> Mesh:
    """One device: the first of the default backend."""
    return Mesh(jax.devices()[:1])
