"""The decoder without its numbers: which parameters there are, and how to bind them.

Loaders ask `specs` what to read; step programs call `bind` while tracing. On the way into a program
parameters are one flat dict, split from the Flax module once, here.
"""

from __future__ import annotations

from typing import Any

from flax import nnx

from .config import ModelConfig
from .decoder import Decoder
from .weights import Params, WeightSpec


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


class AbstractDecoder:
    """Built once per model; holds shapes only."""

    def __init__(self, config: ModelConfig, dtype: str):
        self.config = config
        self.dtype = dtype
        abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
        self._graph, state = nnx.split(abstract)
        self._flat = [(path, leaf) for path, leaf in nnx.to_flat_state(state)]

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """Every parameter by name, in a fixed order."""
        return {
            _name(path): WeightSpec(tuple(leaf.shape), str(leaf.dtype), leaf.get_metadata()["axes"])
            for path, leaf in self._flat
        }

    def bind(self, params: Params) -> Decoder:
        """The decoder around `params`; cheap, and meant to be called while tracing."""
        flat = [(path, leaf.replace(params[_name(path)])) for path, leaf in self._flat]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    def initial_params(self, seed: int) -> Params:
        """Freshly initialised parameters, for training and tests."""
        model = Decoder(self.config, dtype=self.dtype, rngs=nnx.Rngs(seed))
        _, state = nnx.split(model)
        return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}
