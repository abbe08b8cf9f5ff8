"""The decoder without its numbers: which parameters there are, and how to bind them.

Loaders ask `specs` what to read; step programs call `bind` while tracing. On the way into a program
parameters are one flat dict, split from the Flax module once, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx

from .config import ModelConfig
from .decoder import Decoder
from .mesh import RULES, TENSOR
from .parallel import arrange, local_config
from .weights import Params, WeightSpec


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


class AbstractDecoder:
    """Built once per model; holds shapes only.

    Args:
      config: the whole model's numbers.
      dtype: of weights and activations.
      shards: devices the model is cut over. With more than one, `bind` takes and gives one device's
        share, inside a `shard_map`.
    """

    def __init__(self, config: ModelConfig, dtype: str, shards: int = 1):
        self.config = config
        self.dtype = dtype
        self.shards = shards
        self.local = local_config(config, shards)
        abstract = nnx.eval_shape(
            lambda: Decoder(
                self.local, dtype=dtype, rngs=nnx.Rngs(0), whole=config if shards > 1 else None
            )
        )
        self._graph, state = nnx.split(abstract)
        self._flat = [(path, leaf) for path, leaf in nnx.to_flat_state(state)]

    @cached_property
    def specs(self) -> Mapping[str, WeightSpec]:
        """Every parameter by name, in a fixed order, as arranged for all shards together."""
        return MappingProxyType({_name(path): self._spec(leaf) for path, leaf in self._flat})

    def _spec(self, leaf: Any) -> WeightSpec:
        axes = leaf.get_metadata()["axes"]
        shape = [
            size * (self.shards if axis is not None and RULES[axis] == TENSOR else 1)
            for size, axis in zip(leaf.shape, axes, strict=True)
        ]
        return WeightSpec(tuple(shape), str(leaf.dtype), axes)

    def arrange(self, name: str, array: np.ndarray) -> np.ndarray:
        """A whole parameter from a checkpoint, laid out as `specs` says."""
        return arrange(array, self.specs[name].axes, self.config, self.shards)

    def bind(self, params: Params) -> Decoder:
        """The decoder around `params`; cheap, and meant to be called while tracing."""
        flat = [(path, leaf.replace(params[_name(path)])) for path, leaf in self._flat]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def initial_params(self, seed: int) -> Params:
        """Freshly initialised parameters, for training and tests."""
        model = Decoder(self.config, dtype=self.dtype, rngs=nnx.Rngs(seed))
        _, state = nnx.split(model)
        return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}
