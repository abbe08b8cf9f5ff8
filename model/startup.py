"""From settings to sizes and programs: the page count settled, every program loaded or compiled.

Called by serving/assemble.py and `quire inspect`. KV pages get what programs leave, and programs
say what they need only once they are compiled, for some page count. Their need does not depend on
that count, so the first start guesses it where it is little beside the pages, or else compiles the
largest programs; settles the count and compiles all; and writes the need down beside the programs,
so that later starts know the count at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import EngineConfig
from ..errors import InvalidConfig
from .abstract import AbstractDecoder
from .cache import cache_groups, token_bytes
from .compile import Compilation, Progress, compile_all
from .config import DTYPE_BYTES, ModelConfig
from .decoder import run_layer
from .devices import DeviceMemory
from .ladder import Bucket, Sampler
from .memory import MIB, STEPS_IN_FLIGHT, MemoryTable
from .mesh import Mesh
from .parallel import local_config
from .plan import RunnerSpec
from .program_store import ProgramStore
from .programs import SCORE, STATE, Programs, SampleKey
from .sampling.choose import part_size, rows_at_once
from .score import SCORE_ROWS
from .sizing import Sizes, largest_parameter_bytes, serving_dtype, settle

_NEED = "need"
"""Stands for a program in the facts under which the need of all of them is kept."""

_SLIGHT = 0.02
"""Where programs can be guessed to need less than this share of what they leave to pages, the guess
is taken, and checked when all are compiled: to measure the largest first would cost 7 s on an
H200's host."""

_TIGHT = 0.25
"""Where less than this share of the budget is spare, the largest programs are compiled first: the
page count may change, and all others would have to be compiled again."""


_LOGIT_BYTES = 4
"""Sampling works on float32."""

_PARTS_BYTES = 128 * MIB
"""More than attention keeps of rows that several programs share."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes programs take beside what lives as long as the engine.

    Attributes:
      temp: working memory of the program that needs most.
      staging: inputs and results of the steps in flight, and what a step's programs hand over.
    """

    temp: int = 0
    staging: int = 0

    def at_least(self, table: MemoryTable) -> Need:
        return Need(max(self.temp, table.temp), max(self.staging, table.staging))


def guessed_need(model: ModelConfig, dtype: str, rows: int, tokens: int) -> Need:
    """More than a GPU's programs need, by their largest arrays: the logits that a forward leaves
    and what is made of them (two arrays of those sampled at a time), a layer's activations, and
    parts of attention beside them.

    Programs compiled for an H200 (1,024 rows, 2,048 tokens) need 0.96 GB for Llama-3.1-8B, guessed
    1.66, and 1.13 for Qwen2.5-1.5B, guessed 1.80.

    Args:
      model: of one device's share, but with the whole vocabulary: logits are gathered.
      dtype: of activations.
      rows, tokens: of the largest step.
    """
    row = model.vocab_size * _LOGIT_BYTES
    logits, sampling = rows * row * 5 // 4, 2 * part_size(rows, rows_at_once(rows)) * row
    heads = model.q_size + 2 * model.kv_size
    widths = 4 * model.hidden_size + heads + 2 * model.intermediate_size
    activations = tokens * widths * DTYPE_BYTES[dtype]
    return Need(temp=max(logits, sampling) + activations + _PARTS_BYTES, staging=logits)


class Startup:
    """Prepares one engine.

    Args:
      config: the user's settings.
      model: the checkpoint's numbers.
      mesh: the devices.
      device: what each of them has.
      store: where programs are kept; None keeps none.
      problems: what a user should know of that.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        mesh: Mesh,
        device: DeviceMemory,
        store: ProgramStore | None,
        problems: Sequence[str] = (),
    ) -> None:
        self._config, self._model, self._mesh = config, model, mesh
        self._device, self._store = device, store
        self._problems = tuple(problems)
        self.dtype = serving_dtype(config, model, mesh.platform)
        self.decoder = AbstractDecoder(model, self.dtype, mesh.shards)
        self._local = local_config(model, mesh.shards)
        rows = self._settle(Need()).spec.ladder.max_rows
        # What is sure to be needed: with none, the largest program would be measured with more
        # pages than the device holds beside a step's logits, which XLA says aloud.
        self._least = Need(staging=rows * self._local.vocab_size * _LOGIT_BYTES)
        self._first = self._settle(self._least).spec

    def sizes(self) -> Sizes:
        """The sizes as far as they are known: all, or all but the programs' need."""
        return self._settle(self._known() or self._least)

    def measured_sizes(self, threads: int = 1) -> Sizes:
        """The sizes with the programs' need, for which the largest programs may be compiled."""
        need = self._known()
        if need is None:
            programs = self._programs(self._first)
            need = _need(programs, self._compile(programs, programs.demanding, threads))
        return self._settle(need)

    def prepare(
        self,
        *,
        threads: int,
        before_compiling: Callable[[], object] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Sizes, Compilation[Any]]:
        """Every program, ready to run, and the sizes they were made for.

        Args:
          threads: programs compiled at once.
          before_compiling: called unless everything is stored.
          progress: called with (done, total) as programs are there.
        """
        need = self._known()
        sizes = self._settle(need or self._least)
        spare = sizes.memory.budget - sizes.memory.total
        if need is None and spare < _TIGHT * sizes.memory.budget:
            if before_compiling is not None:
                before_compiling()
            sizes = self.measured_sizes(threads)
        while True:
            programs = self._programs(sizes.spec)
            got = self._compile(
                programs, list(programs.lowerings()), threads, before_compiling, progress
            )
            # What is written down is what these sizes were settled with, if that was enough: the
            # next start must come to the same sizes, or it would find nothing.
            need = _need(programs, got).at_least(sizes.memory)
            last, sizes = sizes, self._settle(need)
            if replace(sizes.spec, ladder=last.spec.ladder) == last.spec:
                if need != self._remembered():
                    self._remember(need)
                return sizes, got

    @property
    def problems(self) -> tuple[str, ...]:
        """What a user should know of stored programs: why there are none, or not all."""
        return (*self._problems, *(self._store.problems if self._store is not None else ()))

    def tidy(self) -> None:
        """Keeps the store within its limit."""
        if self._store is not None:
            self._store.prune()

    def forget(self, sizes: Sizes, why: str) -> None:
        """Removes the stored programs of these sizes."""
        programs = self._programs(sizes.spec)
        if self._store is not None:
            for key in programs.lowerings():
                self._store.discard(programs.facts(key), why)

    @property
    def layers(self) -> int:
        return self._model.num_layers

    @property
    def tuned_at_once(self) -> int | None:
        """Products by the largest parameter that fit a GPU beside the weights, operands and result;
        XLA tries its kernels on them while it compiles, when there are no KV pages yet."""
        if self._mesh.platform != "gpu":
            return None
        table = self.sizes().memory
        beside = table.budget - table.reserve - table.weights
        return beside // (largest_parameter_bytes(self._local, self.dtype) + self._least.staging)

    def _settle(self, need: Need) -> Sizes:
        mesh = self._mesh
        groups = cache_groups(self._model, self.dtype, mesh.shards, mesh.platform)
        return settle(
            self._config,
            self._model,
            platform=self._mesh.platform,
            capacity=self._device.capacity,
            pool=self._device.pool,
            kv_token_bytes=token_bytes(groups) // self._mesh.shards,
            shards=self._mesh.shards,
            temp_bytes=need.temp,
            staging_bytes=need.staging,
        )

    def _programs(self, spec: RunnerSpec) -> Programs:
        return Programs(self.decoder, spec, self._mesh)

    def _compile(
        self,
        programs: Programs,
        keys: list[Any],
        threads: int,
        before_compiling: Callable[[], object] | None = None,
        progress: Progress | None = None,
    ) -> Compilation[Any]:
        lowerings = programs.lowerings()
        compiled = compile_all(
            {key: lowerings[key] for key in keys},
            threads=threads,
            options=programs.compiler_options,
            store=self._store,
            facts=programs.facts,
            kernels=programs.take_kernels,
            devices=self._mesh.devices,
            before_compiling=before_compiling,
            progress=progress,
        )
        # Or each engine of a process would leave some megabytes behind.
        run_layer.clear_cache()  # type: ignore[attr-defined]
        return compiled

    def _known(self) -> Need | None:
        """The need without compiling: as an earlier start found it, or a guess if that will do."""
        if (found := self._remembered()) is not None or self._mesh.platform != "gpu":
            return found
        ladder = self._first.ladder
        share = replace(self._local, vocab_size=self._model.vocab_size)
        guess = guessed_need(share, self.dtype, ladder.max_rows, ladder.max_tokens)
        table = self._settle(self._least).memory
        if guess.temp + guess.staging >= _SLIGHT * (table.budget - table.total + table.kv):
            return None
        try:
            self._settle(guess)
        except InvalidConfig:  # what they really need may leave what the user asks for
            return None
        return guess

    # The need is kept under the sizes of a start that does not know it.

    def _remembered(self) -> Need | None:
        if self._store is None:
            return None
        entry = self._store.get(self._need_facts())
        return None if entry is None else Need(**entry.figures)

    def _remember(self, need: Need) -> None:
        if self._store is not None:
            figures = {"temp": need.temp, "staging": need.staging}
            self._store.put(self._need_facts(), b"", figures)

    def _need_facts(self) -> dict[str, str]:
        ladder = ", ".join(map(str, self._first.ladder.buckets))
        return {**self._programs(self._first).facts(_NEED), "ladder": ladder}


def _need(programs: Programs, compiled: Compilation[Any]) -> Need:
    """Of a step that runs while the results of the others in flight wait to be fetched.

    What samples and scores after a forward is enqueued with it, so its logits and hidden states are
    there once, and gone with the next step.
    """
    found = {key: figures for key, figures in compiled.figures.items() if key != STATE}

    def held(key: Any) -> int:
        return found[key]["outputs"] + programs.input_bytes(key)

    running = waiting = 0
    for key, figures in found.items():
        temp, left, passed = figures["temp"], held(key), 0
        if isinstance(key, Bucket) and key.apart:
            rows = programs.logit_rows(key)
            samples = {SampleKey(rows, sampler) for sampler in (Sampler.SAMPLE, Sampler.FULL)}
            after = {SCORE, *samples} & found.keys()
            temp = max([temp, *(found[part]["temp"] for part in after)])
            scores = -(-key.tokens // SCORE_ROWS) * held(SCORE) if SCORE in after else 0
            sampled = max((held(part) for part in samples & after), default=0)
            passed, left = left, scores + sampled
        running, waiting = max(running, temp + passed + left), max(waiting, left)
    temp = max(figures["temp"] for figures in found.values())
    return Need(temp, running + (STEPS_IN_FLIGHT - 1) * waiting - temp)
