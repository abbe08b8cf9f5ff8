"""An engine that is fed token ids, and a clock on what comes back. Used by the benchmarks of whole
engines.

It is what `LLM` and `quire serve` run, without text: the peers were measured without it too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from ...config import EngineConfig
from ...errors import Internal
from ...sched.engine import Engine
from ...sched.request import Request, RequestOutput, SamplingParams
from ...sched.scheduler import Scheduler
from ...sched.stats import EngineStats
from ...serving.assemble import Assembled, assemble
from ...serving.collector import quiet_collector
from ...serving.progress import Reporter
from ..inspect_command import memory
from .step_clock import Step, StepClock

LOOK_EVERY = 0.2
"""Seconds between updates of the progress bar."""

PARTS = ("before", "launch", "collect", "rest")
"""Where the host is while a request runs alone, in the order of its life: before the first launch,
in launches, collecting results (which is waiting, most of it), and after the last of them."""


def _nobody(done: int, total: int) -> None:
    """Hears how far a run is that has no progress bar."""


@dataclass(slots=True)
class Run:
    """Requests that were submitted together, or as others ended, and when their tokens came.

    Attributes:
      sent: seconds from the start of submission to when each was submitted.
      first, last: seconds from the start of submission to each request's first and last token.
      tokens: output tokens of each.
      seconds: from the start of submission to the last token of all.
      error: of the first request that failed.
      steps: that ran meanwhile, in order.
      room: for requests that may yet be under way.
    """

    room: threading.Semaphore
    sent: list[float]
    first: list[float]
    last: list[float]
    tokens: list[int]
    begin: float = 0.0
    seconds: float = 0.0
    ended: int = 0
    error: Exception | None = None
    steps: list[Step] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)


class TokenEngine:
    """An assembled engine. Use `with`, or call `close`."""

    def __init__(self, config: EngineConfig, reporter: Reporter):
        self._reporter = reporter
        self._index: dict[str, int] = {}
        self._run: Run | None = None
        self._hear: Callable[[list[RequestOutput]], None] | None = None
        self.config = config
        self.parts: Assembled = assemble(config, self._deliver, reporter)
        self._clock = StepClock(self.parts.runner)
        quiet_collector()

    def __enter__(self) -> TokenEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.parts.engine.stop(drain=False)

    def stats(self) -> EngineStats:
        return self.parts.engine.stats()

    @property
    def longest(self) -> int:
        """Most tokens of prompt and output together."""
        return self.parts.sizes.spec.max_model_len

    @property
    def vocab(self) -> int:
        return self.parts.sizes.spec.vocab_size

    def run(
        self,
        prompts: Sequence[tuple[int, ...]],
        outputs: Sequence[int],
        name: str = "",
        most: int | None = None,
        look: Callable[[Run], None] | None = None,
    ) -> Run:
        """Submits prompts, greedy; each gets exactly as many tokens as `outputs` says.

        Args:
          prompts: token ids.
          outputs: output tokens of each.
          name: of the progress bar; "" shows none.
          most: requests under way at once, each that ends is followed by the next; None: all are
            submitted at once.
          look: is shown the run every LOOK_EVERY, on this thread, while it goes on.

        Raises:
          QuireError: what ended a request early.
        """
        count = len(prompts)
        room = threading.Semaphore(count if most is None else most)
        run = Run(room, [0.0] * count, [0.0] * count, [0.0] * count, [0] * count)
        self._run, self._index = run, {}
        self._clock.steps = run.steps
        with self._reporter.phase(name) if name else nullcontext(_nobody) as update:
            run.begin = time.perf_counter()
            for at, (prompt, length) in enumerate(zip(prompts, outputs, strict=True)):
                while not room.acquire(timeout=LOOK_EVERY):
                    update(sum(run.tokens), sum(outputs))
                request = self.request(prompt, length)
                self._index[request.id] = at
                run.sent[at] = time.perf_counter() - run.begin
                self.parts.engine.submit(request)
            while not run.done.wait(LOOK_EVERY):
                update(sum(run.tokens), sum(outputs))
                if look is not None:
                    look(run)
        self._clock.steps = None
        run.seconds = max(run.last)
        if run.error is not None:
            raise run.error
        if run.tokens != list(outputs):
            raise Internal(f"bench: {sum(run.tokens)} tokens came, {sum(outputs)} were asked for")
        return run

    def first_token(
        self, prompt: tuple[int, ...], look: Callable[[Run], None] | None = None
    ) -> tuple[Run, dict[str, float]]:
        """One request for one token, on an idle engine: its run, and its seconds by PARTS."""
        self._clock.calls.clear()
        run = self.run([prompt], [1], look=look)
        parts = dict.fromkeys(PARTS, 0.0)
        for kind, begin, end in self._clock.calls:
            if not parts["launch"]:
                parts["before"] = begin - run.begin
            parts[kind] += end - begin
        parts["rest"] = run.seconds - sum(parts.values())
        return run, parts

    def request(self, prompt: tuple[int, ...], output: int) -> Request:
        """A greedy request for exactly so many tokens."""
        sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return self.parts.intake.request(prompt, sampling)

    def hear(self, listener: Callable[[list[RequestOutput]], None] | None) -> None:
        """From now on `listener` gets all outputs, on the engine's thread; None: `run` does."""
        self._hear = listener

    def limit_pages(self, pages: int) -> Scheduler:
        """Goes on with a new scheduler that has fewer pages, page 0 included; returns it. The
        runner, its programs and its slab stay, so that nothing else differs.

        The engine must be idle. The scheduler is the engine's, and may be asked when that was
        closed.
        """
        old, sizes = self.parts, self.parts.sizes
        old.engine.stop()
        scheduler = Scheduler(
            replace(sizes.spec, num_pages=pages),
            max_batched_tokens=sizes.spec.ladder.max_tokens,
            prefill_chunk=sizes.prefill_chunk,
            prefix_caching=self.config.prefix_caching,
            max_queue=self.config.max_queue,
        )
        engine = Engine(
            old.runner, scheduler, overlap=self.config.overlap, on_outputs=self._deliver
        )
        self.parts = replace(old, engine=engine)
        engine.start()
        return scheduler

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """On the engine's thread."""
        if self._hear is not None:
            self._hear(outputs)
            return
        run = self._run
        if run is None:
            return
        now = time.perf_counter() - run.begin
        for output in outputs:
            at = self._index[output.request_id]
            if not run.tokens[at]:
                run.first[at] = now
            run.tokens[at] += len(output.tokens)
            if output.finish_reason is not None:
                run.last[at] = now
                run.ended += 1
                run.error = run.error or output.error
                run.room.release()
        if run.ended == len(run.tokens):
            run.done.set()

    def described(self) -> dict[str, Any]:
        """The settings and sizes a figure was measured with."""
        sizes, device = self.parts.sizes, jax.devices()[0].platform
        return {
            "model": self.config.model,
            "dummy_weights": self.config.dummy_weights,
            "max_num_seqs": sizes.spec.num_slots,
            "max_batched_tokens": sizes.spec.ladder.max_tokens,
            "decode_steps": self.config.decode_steps,
            "prefix_caching": self.config.prefix_caching,
            "overlap": self.config.overlap,
            "tensor_parallel": self.config.tensor_parallel,
            "collector": "as quire serve sets it",
            "sizes": memory(sizes, device),
        }
