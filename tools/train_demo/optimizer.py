"""The optimizer: Muon for the layers' matrices, Adam for everything else. Called by train.py.

In equal time Muon (Liu et al., arXiv:2502.16982) gets clearly further here than Adam alone. Equal
parameters of all layers are stacked for it, which makes ten small products one batched one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from ...model.weights import Params

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class LearningRates:
    """Learning rates and their course.

    Attributes:
      matrix, other: peaks, of Muon and of Adam.
      weight_decay: of the matrices, times their rate.
      warmup: steps.
      decay: share of the steps over which rates fall to zero in the end.
    """

    matrix: float = 5e-3
    other: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 300
    decay: float = 0.5

    def factor(self, step: int, steps: int) -> float:
        """What the peaks are multiplied with in a step (from 0) of so many."""
        left = (steps - step) / max(1.0, self.decay * steps)
        return max(0.0, min(1.0, (step + 1) / max(1, self.warmup), left))


def make_optimizer(rates: LearningRates) -> optax.GradientTransformation:
    """For stacked parameters, at the peak rates."""

    def which(params: Params) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
        is_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        return {
            name: is_matrix if name.startswith("layers.") and name.endswith(".weight") else None
            for name in params
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            rates.matrix,
            weight_decay=rates.weight_decay,
            # Half as much to carry from one machine to the next.
            mu_dtype=jnp.bfloat16,
            adam_b2=0.98,
            adam_learning_rate=rates.other,
            muon_weight_dimension_numbers=which,
            consistent_rms=0.2,
        ),
    )


def stack(params: Params) -> Params:
    """`layers.{i}.REST` of all layers as one `layers.REST` [layers, ...]; others as they are."""
    groups: dict[str, list[jax.Array]] = {}
    out: Params = {}
    for name in sorted(params, key=_layer_first):
        if match := _LAYER.fullmatch(name):
            groups.setdefault(f"layers.{match[2]}", []).append(params[name])
        else:
            out[name] = params[name]
    return out | {name: jnp.stack(arrays) for name, arrays in groups.items()}


def unstack(stacked: Params, names: Iterable[str]) -> Params:
    """The parameters called `names` again."""
    out: Params = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        out[name] = stacked[f"layers.{match[2]}"][int(match[1])] if match else stacked[name]
    return out


def _layer_first(name: str) -> tuple[int, str]:
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, name)
