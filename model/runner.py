"""The runner: plans in, tokens out, one step late. The only code that touches the device.

It owns the parameters, the slabs, the slots and their controls, and the compiled programs. `launch`
packs a plan, hands it over and returns; `collect` waits for the copies that `launch` started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from .abstract import AbstractDecoder
from .cache import CacheGroup, Slabs
from .compile import CompileCounter, Progress
from .dispatch import direct
from .inputs import (
    ADMIT_ROOM,
    InputLayout,
    admit_buffers,
    blank_updates,
    fits,
    pack,
)
from .memory import STEPS_IN_FLIGHT
from .mesh import Mesh
from .outputs import unpack_outputs
from .plan import Bucket, Emit, RunnerSpec, Sampler, ScoredRow, StepOutputs, StepPlan
from .pool_holes import leave_holes
from .programs import ADMIT, CONTROLS, SCORE, STATE, Key, Programs, SampleKey, forward_key
from .sampling.control_inputs import control_buffers, empty_buffer
from .sampling.controls import Controls
from .score import score_buffers, unpack_scores
from .weights import Params

_GPU_WARMUP_RUNS = 3  # the first run warms up, the second captures the CUDA graph, the third checks


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step under way: its packed outputs are being copied to the host."""

    plan: StepPlan
    outputs: jax.Array  # int32 [R or R + 1, words]
    scores: tuple[jax.Array, ...] = ()  # int32 [SCORE_ROWS, LOGPROB_WORDS] each
    pooled: jax.Array | None = None  # float32 [L, E] where a row emits POOLED, L as in `Passed`


class ModelRunner:
    """A `Runner` (model/plan.py) over real devices.

    Args:
      decoder: the model without its numbers.
      params: every parameter of `decoder.specs`, placed on the mesh.
      spec: sizes and ladder.
      mesh: the devices.
      compiled: programs that are there already (model/startup.py). Slabs are made here, so compile
        before: tuning on the device needs room.
    """

    def __init__(
        self,
        decoder: AbstractDecoder,
        params: Params,
        spec: RunnerSpec,
        mesh: Mesh,
        *,
        compiled: Mapping[Any, Compiled] = MappingProxyType({}),
    ) -> None:
        # In the order that the programs take them.
        self._params, self._mesh = {name: params[name] for name in decoder.specs}, mesh
        self._spec = spec
        self._programs = Programs(decoder, spec, mesh)
        self._compiled: dict[Key, Compiled] = dict(compiled)
        self._calls: dict[Key, Callable[..., Any]] = {}
        self.reset()
        self._ready_counter = CompileCounter()  # without `warmup`, ready is now

    @property
    def spec(self) -> RunnerSpec:
        return self._spec

    @property
    def groups(self) -> tuple[CacheGroup, ...]:
        return self._programs.groups

    @property
    def params(self) -> Mapping[str, jax.Array]:
        """Weights by name. Programs keep those they were called with first."""
        return MappingProxyType(self._params)

    @property
    def slabs(self) -> Slabs:
        """The KV as it is now; the next launch donates it."""
        return self._slabs

    @property
    def compiles_after_ready(self) -> int:
        """Compilations in this process, whoever caused them, since `warmup` ended; the engine's own
        are an error. Without `warmup`, since construction: each program's first use counts.
        """
        return self._ready_counter.count

    def reset(self) -> None:
        """Fresh slabs and slots; all KV is lost."""
        self._slabs: Slabs = {}  # frees the old ones first: both together may not fit
        self._controls: Controls | None = None
        self._fences: list[jax.Array] = []  # else new holes are the old ones, and lose their fences
        self._slabs, self._slots, self._controls = self._call(STATE)()
        self._fences = leave_holes(self._mesh)

    # Programs

    def _program(self, key: Key) -> Compiled:
        if key not in self._compiled:  # only without `warmup`
            options = self._programs.compiler_options(key)
            self._compiled[key] = self._programs.lower(key).compile(compiler_options=options)
        return self._compiled[key]

    def _call(self, key: Key) -> Callable[..., Any]:
        """A program as a function of what is not a parameter."""
        if key not in self._calls:
            takes_params = isinstance(key, Bucket) or key == SCORE
            fixed = ((*self._params.values(),),) if takes_params else ()
            self._calls[key] = direct(self._program(key), *fixed)
        return self._calls[key]

    def warmup(self, progress: Progress | None = None) -> None:
        """Compiles what is not compiled, runs each program on nothing, and arms the compile guard.

        Args:
          progress: called with (done, total) as kinds of steps have run.
        """
        runs = _GPU_WARMUP_RUNS if self._mesh.platform == "gpu" else 1
        idle: list[Callable[[], object]] = [
            partial(self._admit, blank_updates(ADMIT_ROOM, self._spec.num_slots)),
            partial(self._fill_controls, empty_buffer(self._spec.num_slots)),
        ]
        # They bring all other programs along.
        idle += [partial(self._run_idle, bucket) for bucket in reversed(self._spec.ladder.buckets)]
        for done, run in enumerate(idle):
            for _ in range(runs):
                run()
            if progress is not None:
                progress(done + 1, len(idle))
        # As many at once as the engine has in flight, of the kind that leaves most behind: what
        # serving takes at its peak has been taken before ready.
        richest = max(self._spec.ladder.buckets, key=lambda b: (b.sampler, b.rows, b.tokens))
        for launched in [self.launch(_idle(richest)) for _ in range(STEPS_IN_FLIGHT)]:
            self.collect(launched)
        self._ready_counter = CompileCounter()

    def _run_idle(self, bucket: Bucket) -> None:
        """Runs a step with no rows: it changes nothing, as padding must not."""
        self.collect(self.launch(_idle(bucket)))

    # Steps

    def launch(self, plan: StepPlan) -> _Launched:
        """Starts a step; returns before the device is done."""
        _check(plan)
        layout = self._programs.layout(plan.bucket)
        plan = self._send_ahead(plan, layout)
        inputs = pack(plan, layout)
        if plan.bucket.apart:
            launched = self._launch_apart(plan, inputs)
        else:
            step = self._call(plan.bucket)
            self._slabs, self._slots, outputs = step(self._slabs, self._slots, inputs)
            launched = _Launched(plan, outputs)
        for array in (launched.outputs, *launched.scores, launched.pooled):
            if array is not None:
                array.copy_to_host_async()
        return launched

    def _launch_apart(self, plan: StepPlan, inputs: np.ndarray) -> _Launched:
        """Forward and sampling as two programs, and scores of what the forward left."""
        forward = self._call(forward_key(plan.bucket))
        self._slabs, self._slots, logits, which, hidden, pooled = forward(
            self._slabs, self._slots, inputs
        )
        scores = [self._call(SCORE)(hidden, buffer) for buffer in score_buffers(plan)]
        rows, sampler = self._spec.ladder.logit_rows(plan.bucket), plan.bucket.sampler
        sample = SampleKey(rows, sampler)
        if sampler == Sampler.FULL:
            self._controls, self._slots, _, outputs = self._call(sample)(
                self._controls, self._slots, logits, which
            )
        else:
            self._slots, _, outputs = self._call(sample)(self._slots, logits, which)
        wanted = pooled if np.any(plan.emits == Emit.POOLED) else None
        return _Launched(plan, outputs, tuple(scores), wanted)

    def collect(self, handle: _Launched) -> StepOutputs:
        """Waits for a launched step."""
        plan = handle.plan
        outputs = unpack_outputs(np.asarray(handle.outputs), plan.num_rows, plan.k)
        if handle.pooled is not None:
            rows = np.flatnonzero(plan.emits == Emit.POOLED)
            outputs = dataclasses.replace(outputs, pooled=np.asarray(handle.pooled)[rows])
        if not plan.scored:
            return outputs
        blocks = [np.asarray(block) for block in handle.scores]
        return dataclasses.replace(outputs, scored=unpack_scores(blocks, plan))

    def _send_ahead(self, plan: StepPlan, layout: InputLayout) -> StepPlan:
        """Runs `controls` and `admit` for what the step's own buffer cannot carry; returns the plan
        without it."""
        for buffer in control_buffers(plan.controls, self._spec.num_slots):
            self._fill_controls(buffer)
        if fits(plan, layout):
            return plan
        for buffer in admit_buffers(plan, self._spec.num_slots):
            self._admit(buffer)
        return dataclasses.replace(
            plan,
            inits=(),
            page_adds=np.zeros((0, 3), np.int32),
            page_copies=np.zeros((0, 2), np.int32),
        )

    def _admit(self, buffer: np.ndarray) -> None:
        self._slabs, self._slots = self._call(ADMIT)(self._slabs, self._slots, buffer)

    def _fill_controls(self, buffer: np.ndarray) -> None:
        self._controls = self._call(CONTROLS)(self._controls, buffer)


def _idle(bucket: Bucket) -> StepPlan:
    """A step without rows; one token is scored where the bucket can."""
    none = np.zeros(0, np.int32)
    scores = bucket.sampler == Sampler.FULL and not bucket.decode_only
    scored = (ScoredRow(0, np.zeros(1, np.int32)),) if scores else ()
    return StepPlan(
        none, none, none, none, none, num_decode=0, bucket=bucket, scored=scored, k=bucket.k
    )


def _check(plan: StepPlan) -> None:
    """Raises ValueError for what no program of this runner does."""
    bucket = plan.bucket
    if plan.k != bucket.k:
        raise ValueError(f"plan.k: got {plan.k}, must be its bucket's {bucket.k}")
    if bucket.sampler != Sampler.FULL or bucket.decode_only:
        for name, wanted in (
            ("scored", bool(plan.scored)),
            ("emits: POOLED", bool(np.any(plan.emits == Emit.POOLED))),
        ):
            if wanted:
                raise ValueError(f"plan.{name}: needs a FULL bucket with prompt rows, got {bucket}")
