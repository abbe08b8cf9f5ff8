"""A real model behind a scheduler, stepped by the test, so that a test can force what it wants to
see: small page pools, other ladders, other chunks. One runner serves many schedules, so programs
compile once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire.checkpoints.folder import Checkpoint
from quire.model.abstract import AbstractDecoder
from quire.model.ladder import Bucket, Ladder, Sampler
from quire.model.mesh import default_mesh
from quire.model.plan import RunnerSpec
from quire.model.runner import ModelRunner
from quire.sched.engine import Engine
from quire.sched.request import FinishReason, Request, RequestOutput, SamplingParams
from quire.sched.scheduler import Scheduler
from quire.serving.assemble import load

MAX_TOKENS = 1024


def ladder(*shapes: tuple[int, int]) -> Ladder:
    """Rungs of (tokens, rows), for every sampler."""
    return Ladder(Bucket(t, r, s) for t, r in shapes for s in Sampler)


USUAL = ladder((8, 8), (64, 8), (512, 8))


class Bench:
    """A loaded checkpoint on a runner that compiles programs when first used.

    Args:
      folder: a checkpoint.
      dtype: of weights, activations and KV.
      page_size, num_pages: of the slab.
    """

    def __init__(
        self, folder: Path, *, dtype: str = "float32", page_size: int = 16, num_pages: int = 400
    ):
        self.checkpoint = Checkpoint.open(folder)
        mesh = default_mesh()
        decoder = AbstractDecoder(self.checkpoint.config, dtype)
        self.params = load(self.checkpoint, decoder, mesh)
        self.spec = RunnerSpec(
            num_slots=8,
            num_pages=num_pages,
            page_size=page_size,
            max_pages_per_seq=-(-512 // page_size),
            max_model_len=512,
            vocab_size=self.checkpoint.config.vocab_size,
            ladder=USUAL,
        )
        self.runner = ModelRunner(decoder, self.params, self.spec, mesh)

    def engine(
        self,
        *,
        chunk: int = MAX_TOKENS,
        budget: int = MAX_TOKENS,
        prefix_caching: bool = True,
        overlap: bool = True,
        scheduler: type[Scheduler] = Scheduler,
        **spec_changes: Any,
    ) -> Session:
        """A fresh engine on this runner; `spec_changes` narrow what the scheduler may use."""
        self.runner.reset()
        spec = dataclasses.replace(self.spec, **spec_changes)
        return Session(
            self.runner,
            scheduler(
                spec,
                max_batched_tokens=budget,
                prefill_chunk=chunk,
                prefix_caching=prefix_caching,
            ),
            overlap,
        )


class Session:
    """An engine stepped by hand, and what came out of it."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, overlap: bool):
        self.scheduler = scheduler
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.engine = Engine(runner, scheduler, overlap=overlap, on_outputs=self._take)

    def _take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)

    def submit(
        self, name: str, prompt: Sequence[int], sampling: SamplingParams, **more: Any
    ) -> None:
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=0)
        self.engine.submit(Request(id=name, prompt=tuple(prompt), sampling=sampling, **more))

    def run(self) -> Session:
        """Steps until nothing is left, checking pages at every step."""
        for _ in range(100_000):
            if not self.engine.has_work:
                self.scheduler.check_integrity()
                return self
            self.engine.step()
            self.scheduler.check_integrity()
        raise AssertionError("the engine does not come to an end")

    def tokens(self, name: str) -> list[int]:
        """The whole answer of a request that ended well."""
        outputs = self.outputs[name]
        last = outputs[-1]
        assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), last
        assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
        return [t for o in outputs for t in o.tokens]

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams] | SamplingParams
    ) -> list[list[int]]:
        """Answers to all prompts, submitted at once."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        for i, (prompt, params) in enumerate(zip(prompts, each, strict=True)):
            self.submit(str(i), prompt, params)
        self.run()
        return [self.tokens(str(i)) for i in range(len(prompts))]
