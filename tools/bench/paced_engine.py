"""An engine process without a device, whose steps take as long as they are told to.

For `quire bench frontend`, and for tests of whole servers: the scheduler, the engine's loop and all
processes are the real ones, only the runner computes nothing. Run by serving/lifeline.py in place
of serving/engine_host/main.py. Each token says when it was made, see `stamp`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ...checkpoints.folder import Checkpoint
from ...checkpoints.locate import locate
from ...config import EngineConfig
from ...model.ladder import make_ladder
from ...model.memory import PLATFORMS
from ...model.plan import Emit, RunnerSpec, StepOutputs, StepPlan
from ...sched.engine import Engine
from ...sched.request import RequestOutput
from ...sched.scheduler import Scheduler
from ...serving.collector import quiet_collector
from ...serving.engine_host import main
from ...serving.intake import Served
from ...serving.progress import Silent

STEP = 0.01
"""Seconds that a step takes."""

FIRST_TOKEN = 256
"""Smallest token id given; below it are the special ones of most tokenizers."""


def stamp(vocab: int, now: float) -> int:
    """The token id that says when it was made: in ms, by so many that the vocabulary can tell."""
    return FIRST_TOKEN + int(now * 1e3) % (vocab - FIRST_TOKEN)


class Clock:
    """When the tokens of one stream were made. The first is less old than what ids can tell, and
    so are those after it against the ones before them."""

    def __init__(self, vocab: int):
        self._span = vocab - FIRST_TOKEN
        self._made: int | None = None

    def age(self, token: int, now: float) -> int:
        """Milliseconds since the stream's next token was made."""
        since = int(now * 1e3)
        stamped = token - FIRST_TOKEN
        if self._made is None:
            self._made = since - (since - stamped) % self._span
        self._made += (stamped - self._made) % self._span
        return since - self._made


class PacedRunner:
    """A `Runner` (model/plan.py) whose steps end `STEP` seconds after each other."""

    def __init__(self, spec: RunnerSpec):
        self.spec = spec
        self._due = 0.0

    def launch(self, plan: StepPlan) -> StepPlan:
        return plan

    def collect(self, handle: StepPlan) -> StepOutputs:
        now = time.monotonic()
        self._due = max(self._due + STEP, now)
        time.sleep(self._due - now)
        token = stamp(self.spec.vocab_size, time.monotonic())
        rows = handle.num_rows
        return StepOutputs(
            tokens=np.full((rows, 1), token, np.int32),
            n_valid=(handle.emits == Emit.TOKEN).astype(np.int32),
            not_finite=np.zeros(rows, np.bool_),
        )

    def reset(self) -> None:
        pass


def build(config: EngineConfig, deliver: Callable[[list[RequestOutput]], None]) -> main.Built:
    """An engine with the tokenizer of `config.model`, and the slots and pages it is asked for."""
    folder = locate(config.model, Silent(), revision=config.revision, offline=config.offline)
    model = Checkpoint.open(folder, weights=False).config
    slots, length = config.max_num_seqs or 256, config.max_model_len or 4096
    page_size = config.page_size or PLATFORMS["gpu"].page_size
    pages = -(-length // page_size)
    spec = RunnerSpec(
        num_slots=slots,
        num_pages=slots * pages + 1,
        page_size=page_size,
        max_pages_per_seq=pages,
        max_model_len=length,
        vocab_size=model.vocab_size,
        ladder=make_ladder(slots, max(2048, 2 * slots)),
    )
    scheduler = Scheduler(
        spec,
        max_batched_tokens=spec.ladder.max_tokens,
        prefill_chunk=spec.ladder.max_tokens,
        max_queue=config.max_queue,
    )
    engine = Engine(PacedRunner(spec), scheduler, overlap=True, on_outputs=deliver)
    engine.start()
    quiet_collector()
    return main.Built(engine, spec, str(folder), Served(config.model, "none"))


async def serve(news: int) -> int:
    """The process's life."""
    return await main.serve(news, build)
