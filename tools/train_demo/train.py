"""The training step and the loop around it: the serving decoder, optax, one jitted program.

Called by `__main__.py`. One step trains both models on one batch: the first learns what is to be
written, every other learns what the first would write (its probabilities, arXiv:1503.02531), since
a draft is good where the two agree. Weights and their gradients are float32, the layers compute in
`compute`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...errors import Internal
from ...model.abstract import AbstractDecoder
from ...model.config import ModelConfig
from ...model.weights import Params
from ...serving.progress import Reporter
from .attention import Mix
from .batch import Batch, batch_logits, unpack
from .data import Plan
from .optimizer import LearningRates, make_optimizer, stack, unstack
from .packing import Layout, Words

LOG_EVERY = 50
EXAM_EVERY = 500
SAVE_EVERY = 120.0  # seconds


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, beside the tasks and the seed."""

    steps: int
    plan: Plan
    rates: LearningRates


SHIPPED = Recipe(18_000, Plan(Layout(((96, 512), (8, 2048)))), LearningRates())
TRIAL = Recipe(
    300, Plan(Layout(((8, 128), (2, 512))), shard=4), LearningRates(matrix=0.01, warmup=30)
)


class State(NamedTuple):
    """What a step changes, of every model by name."""

    params: dict[str, Params]
    optimizer: dict[str, Any]


@dataclass
class Record:
    """How a training went so far. Plain values, kept with the state and beside the model.

    Attributes:
      losses: by step: the mean since the last entry of each model's loss.
      exams: what exam.py found, by step.
      seconds: in all, over every command it took; `waited` for data of these.
      facts: seed, device and settings, for people.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: list[dict[str, Any]] = field(default_factory=list)
    exams: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


Step = Callable[[State, Words, np.float32], tuple[State, dict[str, jax.Array]]]


class Trainer:
    """The programs of a training.

    Args:
      configs: the models; the first teaches the others.
      compute: dtype of activations.
    """

    def __init__(
        self, configs: Mapping[str, ModelConfig], recipe: Recipe, mix: Mix, compute: str
    ) -> None:
        self.recipe = recipe
        self.mix = mix
        self.models = {name: AbstractDecoder(c, compute) for name, c in configs.items()}
        self._masters = {name: AbstractDecoder(c, "float32") for name, c in configs.items()}
        self._optimizer = make_optimizer(recipe.rates)
        self.step: Step = jax.jit(self._step, donate_argnums=0)

    def initial(self, seed: int) -> State:
        params = {name: model.initial_params(seed) for name, model in self._masters.items()}
        return State(params, {name: self._optimizer.init(stack(p)) for name, p in params.items()})

    def logits(self, name: str, params: Params, batch: Batch) -> jax.Array:
        """float32 [T, V]; `params` are float32."""
        model = self.models[name]
        narrow = {key: array.astype(model.dtype) for key, array in params.items()}
        return batch_logits(model.bind(narrow), batch, self.mix)

    def losses(
        self, params: dict[str, Params], words: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Over the tokens that the models have to write: of the first model cross-entropy, of the
        others how far they are from the first (Kullback-Leibler)."""
        batch = unpack(words, self.recipe.plan.layout)
        values: dict[str, jax.Array] = {}
        teacher: jax.Array | None = None
        for name in self.models:
            logits = self.logits(name, params[name], batch)
            if teacher is None:
                values[name] = cross_entropy(logits, batch)
                teacher = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
            else:
                # Written so that the gradient is softmax(logits) less the wanted probabilities.
                wanted = jnp.exp(teacher)
                each = jax.nn.logsumexp(logits, axis=1) - jnp.sum(wanted * logits, axis=1)
                each += jnp.sum(wanted * teacher, axis=1)
                values[name] = mean(each, batch.learned)
        return sum(values.values(), jnp.float32(0.0)), values

    def _step(
        self, state: State, words: jax.Array, factor: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        gradients, values = jax.grad(self.losses, has_aux=True)(state.params, words)
        params, optimizer = {}, {}
        for name, old in state.params.items():
            with jax.named_scope(f"update {name}"):
                updates, optimizer[name] = self._optimizer.update(
                    stack(gradients[name]), state.optimizer[name], stack(old)
                )
                scaled = {key: factor * update for key, update in updates.items()}
                params[name] = optax.apply_updates(old, unstack(scaled, old))
        return State(params, optimizer), values


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    """Mean over the tokens to be learned, from logits [T, V].

    A token of an answer of n counts 1/sqrt(n): else stories and thoughts would drown tasks that are
    answered by a number.
    """
    # A comparison fuses where a gather would scatter in the backward pass.
    is_target = jnp.arange(logits.shape[1]) == batch.targets[:, None]
    right = jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
    counts = jnp.where(batch.learned, jax.lax.rsqrt(jnp.maximum(batch.answers, 1.0)), 0.0)
    return mean(jax.nn.logsumexp(logits, axis=1) - right, counts)


def mean(each: jax.Array, counts: jax.Array) -> jax.Array:
    """Of `each` [T], which count by `counts` [T]."""
    return jnp.sum(jnp.where(counts > 0, each * counts, 0.0)) / jnp.maximum(jnp.sum(counts), 1e-6)


def train(
    trainer: Trainer,
    state: State,
    record: Record,
    batches: Iterator[Words],
    reporter: Reporter,
    *,
    exam: Callable[[State], dict[str, Any]],
    save: Callable[[State, Record], None],
    deadline: float = math.inf,
) -> State:
    """Trains from `record.steps` to the recipe's end or to the deadline, and saves.

    Args:
      record: goes on from here, and says afterwards how far it came.
      batches: from step `record.steps` on.
      exam: measures a state now and then.
      save: keeps a state and the record; called at the end too.
      deadline: on the clock of time.monotonic.

    Raises:
      Internal: the loss is not finite; what was saved before still is.
    """
    recipe = trainer.recipe
    begun, before = time.monotonic(), record.seconds
    saved = noted = begun
    since_log: list[dict[str, jax.Array]] = []
    with reporter.phase("training") as update:
        while record.steps < recipe.steps:
            wait = time.monotonic()
            words = next(batches)
            record.waited += time.monotonic() - wait
            factor = np.float32(recipe.rates.factor(record.steps, recipe.steps))
            # Steps run asynchronously: the next batch is fetched while the device computes.
            state, values = trainer.step(state, words, factor)
            since_log.append(values)
            record.steps += 1
            record.tokens += words.size
            update(record.steps, recipe.steps)
            last = record.steps == recipe.steps
            if not (last or record.steps % LOG_EVERY == 0):
                continue
            record.losses.append({"step": record.steps, **_means(since_log, record.steps)})
            since_log.clear()
            now = time.monotonic()
            record.seconds = before + now - begun
            if last or record.steps % EXAM_EVERY == 0:
                record.exams.append({"step": record.steps, **exam(state)})
                reporter.note(_line(record, EXAM_EVERY * words.size / (now - noted)))
                noted = time.monotonic()
            if now >= deadline and not last:
                reporter.note(f"stopped at step {record.steps} of {recipe.steps} by the time limit")
                break
            if now - saved > SAVE_EVERY and not last:
                save(state, record)
                saved = now
    save(state, record)
    return state


def _means(since_log: list[dict[str, jax.Array]], step: int) -> dict[str, float]:
    """Of each model's loss; waits for the device."""
    values = jax.device_get(since_log)
    means = {name: float(np.mean([each[name] for each in values])) for name in values[0]}
    if not all(math.isfinite(mean) for mean in means.values()):
        raise Internal(f"training: the loss is {means} at step {step}, must be finite")
    return means


def _line(record: Record, speed: float) -> str:
    """The last entries of the record, for people; `speed` in tokens a second."""
    *_, loss = record.losses
    *_, exam = record.exams
    worst = sorted((right / n, task) for task, (right, n) in exam["right"].items())[:4]
    return (
        f"step {record.steps:>6}  {record.tokens / 1e6:,.0f} M tokens, {speed / 1e6:.2f} M/s  loss "
        + " ".join(f"{value:.4f}" for name, value in loss.items() if name != "step")
        + f"  held out {exam['loss']:.4f}, {exam['share']:.1%} right, draft {exam['agrees']:.1%}; "
        + ", ".join(f"{task} {share:.0%}" for share, task in worst)
    )
