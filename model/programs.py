"""The programs of one engine: which there are, and how each is lowered from shapes alone.

Nothing here needs a device or a weight: the runner compiles these for the devices it has, compile
checks (tools/compile_check) for devices that are not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Lowered

from .abstract import AbstractDecoder
from .cache import abstract_slabs, cache_groups
from .compile import LOOPS_IN_GRAPHS, VENDOR_TOKENS, compiler_options
from .forward import Forward, make_forward
from .inputs import ADMIT_ROOM, InputLayout
from .kernels import switches
from .kernels.attention.api import default_backend
from .kernels.attention.gpu_lowered import LoweredKernels
from .kernels.kv_write import default_writer
from .mesh import Mesh
from .plan import Bucket, RunnerSpec, Sampler
from .program_store import environment
from .projection import default_projection
from .sampling.control_inputs import BUFFER_WORDS, make_fill
from .sampling.controls import Controls, abstract_controls
from .score import SCORE_ROWS, SCORE_WORDS, make_score
from .slots import abstract_slots
from .step import make_admit, make_full_sample, make_pass, make_sample, make_step


@dataclass(frozen=True, slots=True)
class SampleKey:
    """Names the program that samples so many rows of logits that a forward left."""

    rows: int
    sampler: Sampler


ADMIT = "admit"
"""Names the program that only updates slots and copies pages."""

CONTROLS = "controls"
"""Names the program that fills the controls of slots (model/sampling/control_inputs.py)."""

SCORE = "score"
"""Names the program of prompt log-probabilities (model/score.py)."""

STATE = "state"
"""Names the program that makes slabs, slots and controls anew."""

Key = Bucket | SampleKey | str
"""A program's name. A bucket is a whole step or, where sampling is apart, the forward of all
samplers (`forward_key`)."""


def forward_key(bucket: Bucket) -> Bucket:
    """Names the program that a bucket's step begins with: the whole of it, or its forward."""
    return replace(bucket, sampler=Sampler.FULL) if bucket.apart else bucket


def module_name(key: Key) -> str:
    """What a program is called in profiles and dumps, after "jit_": for which rung it is."""
    match key:
        case Bucket(tokens=tokens, rows=rows, sampler=sampler, k=k, apart=apart):
            end = "" if apart else f"_{sampler.name.lower()}" + (f"_k{k}" if k > 1 else "")
            return f"{'forward' if apart else 'step'}_{tokens}x{rows}{end}"
        case SampleKey(rows=rows, sampler=sampler):
            return f"sample_{rows}_{sampler.name.lower()}"
    return key


class Programs:
    """Lowers the programs of an engine.

    Args:
      decoder: the model without its numbers.
      spec: sizes and ladder.
      mesh: the devices, present or described by a topology.
      attention: a backend of kernels/attention; None is the platform's own.
      writer: one of kernels/kv_write, likewise.
      projection: one of model/projection.py, likewise.
    """

    def __init__(
        self,
        decoder: AbstractDecoder,
        spec: RunnerSpec,
        mesh: Mesh,
        *,
        attention: str | None = None,
        writer: str | None = None,
        projection: str | None = None,
    ) -> None:
        self._decoder, self._spec, self._mesh = decoder, spec, mesh
        self._attention = attention or default_backend(mesh.platform)
        self._writer = writer or default_writer(mesh.platform, mesh.shards)
        self._projection = projection or default_projection(
            mesh.platform, decoder.dtype, mesh.shards
        )
        self.groups = cache_groups(decoder.config, decoder.dtype, mesh.shards, mesh.platform)
        self._facts: dict[str, str] | None = None
        self._kernels = LoweredKernels(mesh.lowering_platforms[0], mesh.abstract, mesh.everywhere)
        self._layouts: dict[Bucket, InputLayout] = {}

    def layout(self, bucket: Bucket) -> InputLayout:
        """Where a plan's parts lie in the buffer of this step program."""
        if bucket not in self._layouts:
            s = self._spec
            sizes = s.page_size, s.num_slots, s.max_pages_per_seq
            self._layouts[bucket] = InputLayout(bucket, *sizes)
        return self._layouts[bucket]

    @cached_property
    def abstract_params(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes, dtypes and placement of all parameters, in the order of `decoder.specs`, as the
        programs take them: JAX would sort the names of a dict of them at each call."""
        return tuple(
            jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype), sharding=self._mesh.of(s.axes))
            for s in self._decoder.specs.values()
        )

    def abstract_state(self) -> tuple[Any, Any]:
        """Shapes, dtypes and placement of (slabs, slots)."""
        s = self._spec
        return (
            abstract_slabs(self.groups, s.num_pages, s.page_size, self._mesh),
            abstract_slots(s.num_slots, s.max_pages_per_seq, self._mesh),
        )

    def abstract_controls(self) -> Controls:
        """Shapes, dtypes and placement of what reshapes slots' logits."""
        return abstract_controls(self._spec.num_slots, self._spec.vocab_size, self._mesh)

    def logit_rows(self, key: Bucket) -> int:
        """Rows of logits that a forward leaves."""
        return self._spec.ladder.logit_rows(key)

    def keys(self) -> list[Key]:
        """Every program. First whole steps, one of each number of tokens before the others: XLA
        tries kernels for the products of so many tokens once and not for several programs at a
        time. Among those the smallest, for whose products there is most to try, then the costliest
        first."""
        ladder = self._spec.ladder
        buckets = {forward_key(b) for b in ladder.buckets}

        def cost(bucket: Bucket) -> tuple[Any, ...]:
            return not bucket.decode_only, bucket.k

        def order(bucket: Bucket) -> tuple[Any, ...]:
            apart = bucket.sampler != Sampler.GREEDY
            tries = bucket.tokens < VENDOR_TOKENS  # XLA's own kernels
            alike = [b for b in buckets if (b.tokens, b.sampler) == (bucket.tokens, bucket.sampler)]
            first = min(alike, key=cost) if tries else max(alike, key=cost)
            return apart, bucket != first, not tries, -bucket.tokens, -bucket.k

        samples = [SampleKey(*sample) for sample in reversed(ladder.samples)]
        return [*sorted(buckets, key=order), SCORE, *samples, CONTROLS, ADMIT, STATE]

    @property
    def demanding(self) -> list[Key]:
        """The programs among which those are that work in most memory."""
        ladder = self._spec.ladder
        largest = ladder.max_tokens, ladder.max_rows
        steps = {forward_key(b) for b in ladder.buckets if (b.tokens, b.rows) == largest}
        return [*sorted(steps), SCORE, SampleKey(*max(ladder.samples)), ADMIT]

    def input_bytes(self, key: Key) -> int:
        """Bytes of the buffer that a program, but STATE, gets from the host."""
        match key:
            case Bucket():
                return 4 * self.layout(key).size
            case SampleKey():
                return 0
        return 4 * {SCORE: SCORE_WORDS, CONTROLS: BUFFER_WORDS, ADMIT: ADMIT_ROOM.words}[key]

    def compiler_options(self, key: Key) -> dict[str, Any]:
        """What XLA is told for a program."""
        match key:
            case Bucket(tokens=tokens):
                return compiler_options(self._mesh.platform, tokens)
            case "score":
                return compiler_options(self._mesh.platform, SCORE_ROWS)
            case SampleKey() if self._mesh.platform == "gpu" and switches.SEARCH_BY == "graph":
                return compiler_options(self._mesh.platform) | LOOPS_IN_GRAPHS
        return compiler_options(self._mesh.platform)

    def facts(self, key: Key | str) -> dict[str, str]:
        """What a stored program is found by, traced or not: whatever `lower` looks at is here."""
        if self._facts is None:
            sizes = asdict(self._spec)
            # Each program is one rung; of the others only the largest matters to it, and those that
            # say how many rows of logits it leaves.
            sizes["ladder"] = self._spec.ladder.max_tokens
            self._facts = {
                **environment(self._mesh),
                "model": json.dumps(asdict(self._decoder.config), sort_keys=True),
                "dtype": self._decoder.dtype,
                "sizes": json.dumps(sizes, sort_keys=True),
                "attention": self._attention,
                "writer": self._writer,
                "projection": self._projection,
            }
        logits = {"logit rows": str(self.logit_rows(key))} if isinstance(key, Bucket) else {}
        return {**self._facts, **logits, "program": str(key)}

    def lowerings(self) -> dict[Key, Callable[[], Lowered]]:
        """Every program, in the order of `keys`."""
        return {key: partial(self.lower, key) for key in self.keys()}

    def take_kernels(self) -> list[Lowered]:
        """Programs of one kernel each, to be compiled before those that have it, lowered since the
        last call (kernels/attention/gpu_lowered.py)."""
        return self._kernels.take_built_alone()

    def lower(self, key: Key) -> Lowered:
        """Traces and lowers one program."""
        match key:
            case Bucket(apart=True):
                return self._lower_pass(key)
            case Bucket():
                return self._lower_step(key)
            case SampleKey():
                return self._lower_sample(key)
            case "score":
                return self._lower_score()
            case "controls":
                return self._lower_controls()
            case "admit":
                return self._lower_admit()
            case "state":
                return self._lower_state()
        raise KeyError(f"no program {key!r}")

    def _lower_step(self, bucket: Bucket) -> Lowered:
        layout = self.layout(bucket)
        args = (self.abstract_params, *self.abstract_state(), self._buffer(layout.size))
        step = self._unnamed(make_step(self._forward(layout), layout))
        return self._lowered(bucket, step, args, donated=(1, 2), fresh=1)

    def _lower_pass(self, bucket: Bucket) -> Lowered:
        layout = self.layout(bucket)
        args = (self.abstract_params, *self.abstract_state(), self._buffer(layout.size))
        sizes = self.logit_rows(bucket), self._hidden_rows
        forward = self._unnamed(make_pass(self._forward(layout), layout, *sizes))
        return self._lowered(bucket, forward, args, donated=(1, 2), fresh=4)

    def _lower_sample(self, key: SampleKey) -> Lowered:
        _, slots = self.abstract_state()
        logits = self._array((key.rows, self._spec.vocab_size), "float32")
        args = (slots, logits, self._array((3, key.rows), "int32"))
        if key.sampler != Sampler.FULL:
            run = make_sample(in_place=self._mesh.platform == "gpu")
            return self._lowered(key, run, args, donated=(0, 1), fresh=1)
        controlled = (self.abstract_controls(), *args)
        return self._lowered(key, make_full_sample(), controlled, donated=(0, 1, 2), fresh=1)

    def _lower_score(self) -> Lowered:
        width = self._decoder.config.hidden_size
        hidden = self._array((self._hidden_rows, width), self._decoder.dtype)
        args = (self.abstract_params, hidden, self._buffer(SCORE_WORDS))
        return self._lowered(SCORE, self._unnamed(make_score(self._decoder)), args, fresh=1)

    def _lower_controls(self) -> Lowered:
        args = (self.abstract_controls(), self._buffer(BUFFER_WORDS))
        return self._lowered(CONTROLS, make_fill(), args, donated=(0,))

    def _lower_admit(self) -> Lowered:
        args = (*self.abstract_state(), self._buffer(ADMIT_ROOM.words))
        return self._lowered(ADMIT, make_admit(self.groups), args, donated=(0, 1))

    def _lower_state(self) -> Lowered:
        abstract = (*self.abstract_state(), self.abstract_controls())
        # Zeroed, not just allocated: a NaN left in unused V would survive a masked p·V.
        make = jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), abstract),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        return self._for_platform(make)

    def _unnamed(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """`program`, whose first argument are parameters by name, taking them as `abstract_params`
        has them."""
        names = tuple(self._decoder.specs)

        def run(params: tuple[jax.Array, ...], *rest: Any) -> Any:
            return program(dict(zip(names, params, strict=True)), *rest)

        return run

    def _forward(self, layout: InputLayout) -> Forward:
        return make_forward(
            self._decoder,
            self.groups,
            layout,
            self.logit_rows(layout.bucket),
            self._attention,
            self._writer,
            self._projection,
        )

    @property
    def _hidden_rows(self) -> int:
        """Of the hidden states that forwards leave for `score`."""
        return self._spec.ladder.max_tokens

    def _array(self, shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self._mesh.everywhere)

    def _buffer(self, size: int) -> jax.ShapeDtypeStruct:
        return self._array((size,), "int32")

    def _lowered(
        self,
        key: Key,
        program: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        donated: tuple[int, ...] = (),
        fresh: int = 0,
    ) -> Lowered:
        """Traced and lowered, cut over the mesh's devices.

        Args:
          key: of the program, which is called so.
          program: returns its donated arguments first, then `fresh` results; a lone one bare.
          args: abstract arguments.
          donated: which of them it updates in place.
          fresh: how many other results it has, each whole on every device.
        """
        placed = jax.tree.map(lambda a: a.sharding, args)
        results = (*(placed[i] for i in donated), *[self._mesh.everywhere] * fresh)
        results = results if len(results) > 1 else results[0]
        split = self._mesh.split(program, placed, results)
        setattr(split, "__name__", module_name(key))  # noqa: B010
        jitted = jax.jit(split, donate_argnums=donated, out_shardings=results)
        return self._for_platform(jitted, *args)

    def _for_platform(self, jitted: Any, *args: Any) -> Lowered:
        """Lowered for the mesh's platform, which need not be this process's."""
        with jax.sharding.use_abstract_mesh(self._mesh.abstract), self._kernels.in_use():
            return jitted.trace(*args).lower(lowering_platforms=self._mesh.lowering_platforms)
