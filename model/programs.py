"""The programs of one engine: which there are, and how each is lowered from shapes alone.

Nothing here needs a device or a weight: the runner compiles these for the devices it has, compile
checks (tools/compile_check) for devices that are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.stages import Lowered

from .abstract import AbstractDecoder
from .cache import abstract_slabs, cache_groups
from .inputs import ADMIT_ROOM, InputLayout
from .kernels.attention.api import default_backend
from .kernels.kv_write import default_writer
from .mesh import Mesh
from .plan import Bucket, RunnerSpec
from .slots import abstract_slots
from .step import make_admit, make_step

ADMIT = "admit"
"""Name of the program that only updates slots and copies pages."""


class Programs:
    """Lowers the programs of an engine.

    Args:
      decoder: the model without its numbers.
      spec: sizes and ladder.
      mesh: the devices, present or described by a topology.
      attention: a backend of kernels/attention; None is the platform's own.
      writer: one of kernels/kv_write, likewise.
    """

    def __init__(
        self,
        decoder: AbstractDecoder,
        spec: RunnerSpec,
        mesh: Mesh,
        *,
        attention: str | None = None,
        writer: str | None = None,
    ) -> None:
        self._decoder, self._spec, self._mesh = decoder, spec, mesh
        self._attention = attention or default_backend(mesh.platform)
        self._writer = writer or default_writer(mesh.platform)
        self.groups = cache_groups(decoder.config, decoder.dtype, mesh.shards, mesh.platform)

    def layout(self, bucket: Bucket) -> InputLayout:
        """Where a plan's parts lie in the buffer of this step program."""
        return InputLayout(bucket, self._spec.page_size, self._spec.num_slots)

    def abstract_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and placement of all parameters."""
        return {
            name: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype), sharding=self._mesh.of(s.axes))
            for name, s in self._decoder.specs.items()
        }

    def abstract_state(self) -> tuple[Any, Any]:
        """Shapes, dtypes and placement of (slabs, slots)."""
        s = self._spec
        return (
            abstract_slabs(self.groups, s.num_pages, s.page_size, self._mesh),
            abstract_slots(s.num_slots, s.max_pages_per_seq, self._mesh),
        )

    def lower(self, key: Any) -> Lowered:
        """Traces and lowers one program, named by its bucket or ADMIT."""
        return self._lower_admit() if key == ADMIT else self._lower_step(key)

    def lowerings(self) -> dict[Any, Callable[[], Lowered]]:
        """Every program, the costliest first."""
        buckets = sorted(self._spec.ladder.buckets, key=lambda b: (-b.tokens, -b.sampler))
        return {key: partial(self.lower, key) for key in [*buckets, ADMIT]}

    def _buffer(self, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size,), jnp.int32, sharding=self._mesh.everywhere)

    def _lower_step(self, bucket: Bucket) -> Lowered:
        layout = self.layout(bucket)
        args = (self.abstract_params(), *self.abstract_state(), self._buffer(layout.size))
        step = make_step(self._decoder, self.groups, layout, self._attention, self._writer)
        return self._lowered(step, args, donated=(1, 2), fresh=(self._mesh.everywhere,))

    def _lower_admit(self) -> Lowered:
        args = (*self.abstract_state(), self._buffer(ADMIT_ROOM.words))
        return self._lowered(make_admit(self.groups), args, donated=(0, 1))

    def _lowered(
        self,
        program: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        donated: tuple[int, ...],
        fresh: tuple[NamedSharding, ...] = (),
    ) -> Lowered:
        """Traced and lowered for the mesh's platform, which need not be this process's.

        Args:
          program: returns its donated arguments first, then `fresh` results.
          args: abstract arguments.
          donated: which of them it updates in place.
          fresh: placement of its other results.
        """
        placed = jax.tree.map(lambda a: a.sharding, args)
        results = (*(placed[i] for i in donated), *fresh)
        split = self._mesh.split(program, placed, results)
        jitted = jax.jit(split, donate_argnums=donated, out_shardings=results)
        with jax.sharding.use_abstract_mesh(self._mesh.abstract):
            return jitted.trace(*args).lower(lowering_platforms=self._mesh.lowering_platforms)
