"""The runner: plans in, tokens out, one step late. The only code that touches the device.

It owns the parameters, the slabs and the slots, and the compiled step programs. `launch` packs a
plan, hands it over and returns; `collect` waits for the copy of the tokens that `launch` started.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled, Lowered

from .abstract import AbstractDecoder
from .cache import CacheGroup, Slabs, abstract_slabs, cache_groups
from .compile import CompileCounter, Progress, compile_all
from .inputs import ADMIT_ROOM, InputLayout, pack, pack_updates
from .mesh import Mesh
from .plan import Bucket, Emit, RunnerSpec, StepOutputs, StepPlan
from .slots import Slots, abstract_slots
from .step import make_admit, make_step, unpack_outputs
from .weights import Params

_ADMIT = "admit"
_GPU_WARMUP_RUNS = 3  # the first run warms up, the second captures the CUDA graph, the third checks


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way: its packed outputs are being copied to the host."""

    outputs: jax.Array  # int32 [R, words]
    plan: StepPlan


class ModelRunner:
    """A `Runner` (model/plan.py) over real devices.

    Args:
      decoder: the model without its numbers.
      params: every parameter of `decoder.specs`, placed on the mesh.
      spec: sizes and ladder.
      mesh: the devices.
    """

    def __init__(
        self, decoder: AbstractDecoder, params: Params, spec: RunnerSpec, mesh: Mesh
    ) -> None:
        self._decoder, self._params, self._mesh = decoder, params, mesh
        self._spec = spec
        self._groups = cache_groups(decoder.config, decoder.dtype)
        self._programs: dict[Any, Compiled] = {}
        self._ready_counter = CompileCounter()  # without `warmup`, ready is now
        self._make_state = self._state_maker()
        self.reset()

    @property
    def spec(self) -> RunnerSpec:
        return self._spec

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self._groups

    @property
    def compiles_after_ready(self) -> int:
        """Compilations in this process, whoever caused them, since `warmup` ended; the engine's own
        are an error. Without `warmup`, since construction: each program's first use counts.
        """
        return self._ready_counter.count

    def reset(self) -> None:
        """Fresh slabs and slots; all KV is lost."""
        self._slabs: Slabs = {}  # frees the old ones first: both together may not fit
        self._slabs, self._slots = self._make_state()

    def _state_maker(self) -> Callable[[], tuple[Slabs, Slots]]:
        """Kept for the runner's life, so that a reset compiles nothing."""
        abstract = self._abstract_state()
        # Zeroed, not just allocated: a NaN left in unused V would survive a masked p·V.
        return jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )

    def _abstract_state(self) -> tuple[Any, Any]:
        s = self._spec
        return (
            abstract_slabs(self._groups, s.num_pages, s.page_size, self._mesh),
            abstract_slots(s.num_slots, s.max_pages_per_seq, self._mesh),
        )

    # Programs

    def _layout(self, bucket: Bucket) -> InputLayout:
        return InputLayout(bucket, self._spec.page_size, self._spec.num_slots)

    def _buffer_struct(self, size: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size,), jnp.int32, sharding=self._mesh.everywhere)

    def _lower_step(self, bucket: Bucket) -> Lowered:
        layout = self._layout(bucket)
        slabs, slots = self._abstract_state()
        params = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), self._params
        )
        state_out = jax.tree.map(lambda a: a.sharding, (slabs, slots))
        step = jax.jit(
            make_step(self._decoder, self._groups, layout),
            donate_argnums=(1, 2),
            out_shardings=(*state_out, self._mesh.everywhere),
        )
        return step.lower(params, slabs, slots, self._buffer_struct(layout.size))

    def _lower_admit(self) -> Lowered:
        slabs, slots = self._abstract_state()
        admit = jax.jit(
            make_admit(self._groups),
            donate_argnums=(0, 1),
            out_shardings=jax.tree.map(lambda a: a.sharding, (slabs, slots)),
        )
        return admit.lower(slabs, slots, self._buffer_struct(ADMIT_ROOM.words))

    def _lowerings(self) -> dict[Any, Callable[[], Lowered]]:
        """Every program, the costliest first."""
        buckets = sorted(self._spec.ladder.buckets, key=lambda b: (-b.tokens, -b.sampler))
        steps = {bucket: partial(self._lower_step, bucket) for bucket in buckets}
        return {**steps, _ADMIT: self._lower_admit}

    def _program(self, key: Any) -> Compiled:
        if key not in self._programs:  # only without `warmup`
            lowered = self._lower_admit() if key == _ADMIT else self._lower_step(key)
            self._programs[key] = lowered.compile()
        return self._programs[key]

    def warmup(self, *, threads: int, progress: Progress | None = None) -> float:
        """Compiles the whole ladder, runs each program on nothing, and arms the compile guard.

        Returns:
          Seconds it took.
        """
        begin = time.monotonic()
        self._programs = compile_all(self._lowerings(), threads=threads, progress=progress)
        runs = _GPU_WARMUP_RUNS if self._mesh.platform == "gpu" else 1
        for key in self._programs:
            for _ in range(runs):
                self._run_idle(key)
        self._ready_counter = CompileCounter()
        return time.monotonic() - begin

    def _run_idle(self, key: Any) -> None:
        """Runs a program with no rows: it changes nothing, as padding must not."""
        if key == _ADMIT:
            self._admit(())
            return
        none = np.zeros(0, np.int32)
        plan = StepPlan(none, none, none, none, none, num_decode=0, bucket=key)
        self.collect(self.launch(plan))

    # Steps

    def launch(self, plan: StepPlan) -> _Launched:
        """Starts a step; returns before the device is done."""
        if plan.k > self._spec.max_k:
            raise ValueError(f"plan.k: got {plan.k}, must be at most {self._spec.max_k}")
        if np.any(plan.emits > Emit.TOKEN):
            raise ValueError("plan.emits: only NONE and TOKEN are served by this runner")
        if plan.controls or plan.scored:
            raise ValueError("plan.controls, plan.scored: not served by this runner")
        layout = self._layout(plan.bucket)
        plan = self._send_ahead(plan, layout)
        program = self._program(plan.bucket)
        self._slabs, self._slots, outputs = program(
            self._params, self._slabs, self._slots, pack(plan, layout)
        )
        outputs.copy_to_host_async()
        return _Launched(outputs, plan)

    def collect(self, handle: _Launched) -> StepOutputs:
        """Waits for a launched step."""
        packed = np.asarray(handle.outputs)
        return unpack_outputs(packed, handle.plan.num_rows, handle.plan.bucket.sampler)

    def _send_ahead(self, plan: StepPlan, layout: InputLayout) -> StepPlan:
        """Runs `admit` for what the step's own buffer cannot carry; returns the plan without it."""
        room = layout.room
        fits = len(plan.inits) <= room.inits and len(plan.page_adds) <= room.adds
        if fits and not len(plan.page_copies):
            return plan
        # Slot initialisation comes before page additions, so all of both go ahead together.
        for at in range(0, len(plan.page_copies), ADMIT_ROOM.copies):
            self._admit((), copies=plan.page_copies[at : at + ADMIT_ROOM.copies])
        for at in range(0, len(plan.inits), ADMIT_ROOM.inits):
            self._admit(plan.inits[at : at + ADMIT_ROOM.inits])
        for at in range(0, len(plan.page_adds), ADMIT_ROOM.adds):
            self._admit((), adds=plan.page_adds[at : at + ADMIT_ROOM.adds])
        return StepPlan(
            plan.slots, plan.generations, plan.starts, plan.counts, plan.emits, plan.num_decode,
            plan.bucket, plan.prompt_tokens, k=plan.k,
        )  # fmt: skip

    def _admit(self, inits: tuple[Any, ...], adds: Any = None, copies: Any = None) -> None:
        buffer = np.zeros(ADMIT_ROOM.words, np.int32)
        pack_updates(buffer, ADMIT_ROOM, self._spec.num_slots, inits, adds, copies)
        self._slabs, self._slots = self._program(_ADMIT)(self._slabs, self._slots, buffer)
