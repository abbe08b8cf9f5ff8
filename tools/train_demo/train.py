"""The training loop: the serving decoder, optax, fixed shapes, one jitted step.

Called by `__main__.py`. Most steps run on short rows, where a token is cheapest; the last ones on
rows of the full context, so that the model has seen the distances it will be served at.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import optax

from ...model.abstract import AbstractDecoder
from ...model.weights import Params
from ...serving.progress import Reporter
from .data import Batch, Stream
from .model import batch_logits

_WARMUP_STEPS = 100
_LOG_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, beside the data.

    Attributes:
      tokens: per step, in rows of `length`, or of the model's whole context at the end.
      long_share: of the steps that run on the whole context.
      matrix_rate, other_rate: peak learning rates, of the layers' matrices (Muon) and of everything
        else (Adam).
    """

    steps: int = 4000
    tokens: int = 2048
    length: int = 128
    long_share: float = 0.08
    matrix_rate: float = 5e-3
    other_rate: float = 3e-3


@dataclass
class Run:
    """A finished training."""

    params: Params
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, mean since the last)
    steps: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0  # the same on a machine that is shared


def train(
    model: AbstractDecoder,
    stream: Stream,
    recipe: Recipe,
    seed: int,
    reporter: Reporter,
    time_limit: float | None = None,
) -> Run:
    """Trains from scratch.

    Args:
      time_limit: seconds after which to stop early. What comes out then depends on the machine's
        speed and not on the seed alone, and its learning rate has not come down.
    """
    optimizer = make_optimizer(recipe)
    run = Run(params=model.initial_params(seed))
    state = optimizer.init(run.params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, state: optax.OptState, batch: Batch
    ) -> tuple[Params, optax.OptState, jax.Array]:
        value, gradients = jax.value_and_grad(partial(loss, model))(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    begin, processor_begin = time.monotonic(), time.process_time()
    since_log: list[jax.Array] = []
    with reporter.phase("training") as update:
        for i in range(recipe.steps):
            # Steps run asynchronously: the next batch is made while the device computes.
            batch = stream.batch(*_shape(recipe, model.config.max_positions, i))
            run.params, state, value = step(run.params, state, batch)
            since_log.append(value)
            run.steps = i + 1
            update(run.steps, recipe.steps)
            late = time_limit is not None and time.monotonic() - begin > time_limit
            if run.steps % _LOG_EVERY == 0 or run.steps == recipe.steps or late:
                mean = float(jnp.mean(jnp.stack(since_log)))
                run.losses.append((run.steps, mean))
                reporter.note(f"step {run.steps:>5}  loss {mean:.4f}")
                since_log.clear()
            if late:
                reporter.note(f"stopped at step {run.steps} by the limit of {time_limit:g} s")
                break
    run.seconds = time.monotonic() - begin
    run.processor_seconds = time.process_time() - processor_begin
    return run


def loss(model: AbstractDecoder, params: Params, batch: Batch) -> jax.Array:
    """Mean cross-entropy of the tokens the model has to write."""
    logits = batch_logits(model.bind(params), batch)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets.reshape(-1))
    counts = batch.is_answer.reshape(-1)
    return jnp.sum(each * counts) / jnp.maximum(jnp.sum(counts), 1)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for embeddings and norms.

    In equal time Muon (Liu et al., arXiv:2502.16982) gets clearly further here than Adam alone.
    """

    def rate(peak: float) -> optax.Schedule:
        warmup = min(_WARMUP_STEPS, recipe.steps // 10 + 1)
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, max(recipe.steps, warmup + 1), end_value=0.01 * peak
        )

    def which(params: Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
        is_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        return {
            name: is_matrix if name.startswith("layers.") and name.endswith(".weight") else None
            for name in params
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            rate(recipe.matrix_rate),
            adam_learning_rate=rate(recipe.other_rate),
            muon_weight_dimension_numbers=which,
            consistent_rms=0.2,
        ),
    )


def _shape(recipe: Recipe, context: int, step: int) -> tuple[int, int]:
    """Rows and their length at a step."""
    is_long = step >= recipe.steps * (1 - recipe.long_share)
    length = context if is_long else recipe.length
    return max(1, recipe.tokens // length), length
