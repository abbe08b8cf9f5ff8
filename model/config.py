"""What a decoder is made of: plain numbers, no JAX. `checkpoints/hf_config.py` makes these.

A model family differs from another by the values here and by its table of tensor names, never by
code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "llama3", "yarn", "dynamic"]
Dtype = Literal["bfloat16", "float16", "float32"]

DTYPES: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding. Formulas and sources: model/rope.py.

    Attributes:
      kind: how frequencies are scaled. "dynamic" equals "default" up to `original_max_positions`,
        and Quire refuses to go beyond (its result there depends on the history of the batch).
      theta: base of the frequencies.
      factor: how much longer than `original_max_positions` the context may be.
      original_max_positions: the length the model was trained at before scaling.
      low_freq_factor, high_freq_factor: llama3 only.
      beta_fast, beta_slow, truncate: yarn only.
      attention_factor: yarn only: multiplies cos and sin; already resolved by whoever made this.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """One generic decoder-only transformer (pre-norm, RMSNorm, rotary, gated MLP).

    Attributes:
      family: "llama", "qwen2", "qwen3" or "mistral"; chooses the table of tensor names only.
      head_dim: size of a head; need not be hidden_size / num_heads.
      qkv_bias, out_bias, mlp_bias: biases on q/k/v, on the attention output, on the MLP.
      qk_norm: RMSNorm over each head of q and k before rotation.
      tied_embeddings: the output projection is the embedding table.
      windows: per layer, how many positions back (itself included) a token sees; None = all.
      max_positions: longest sequence the checkpoint claims to handle.
      dtype: of the checkpoint's own weights.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    max_positions: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        if len(self.windows) != self.num_layers:
            raise ValueError(f"windows: {len(self.windows)} entries for {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def max_served_positions(self) -> int:
        """Longest sequence Quire serves: a "dynamic" rope is refused beyond its original length."""
        if self.rope.kind == "dynamic":
            return min(self.max_positions, self.rope.original_max_positions)
        return self.max_positions
