"""How large an engine is: slots, tokens a step, pages, and the memory they take. Pure.

The page count follows from the configuration and the device's capacity, never from what happens to
be free at the moment, so the same command makes the same programs every time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..config import EngineConfig
from ..errors import InvalidConfig
from .config import DTYPE_BYTES, ModelConfig
from .ladder import MAX_PROGRAMS, make_ladder
from .parallel import local_config
from .plan import RunnerSpec
from .slots import SLOT_WORDS

_KV_SHARE = 0.5
"""Share of the memory left beside the weights that KV pages take unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a platform gets when the user says nothing."""

    num_seqs: int
    batched_tokens: int
    programs: int


_DEFAULTS = {"cpu": Defaults(16, 256, 14)}  # compiling is slow there, padding cheap
_ACCELERATOR = Defaults(256, 2048, MAX_PROGRAMS)


@dataclass(frozen=True, slots=True)
class Sizes:
    """An engine's sizes, settled.

    Attributes:
      dtype: of weights, activations and KV.
      spec: what the scheduler must stay within.
      prefill_chunk: most tokens of one prompt in one step.
      weight_bytes, kv_bytes, slot_bytes: device memory, in bytes.
      token_bytes: KV of one token over all layers.
      capacity: the device's memory, in bytes.
      notes: what was decided in the user's stead, a sentence each.
    """

    dtype: str
    spec: RunnerSpec
    prefill_chunk: int
    weight_bytes: int
    kv_bytes: int
    slot_bytes: int
    token_bytes: int
    capacity: int
    notes: tuple[str, ...]


def host_memory() -> int:
    """Physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def serving_dtype(config: EngineConfig, model: ModelConfig, platform: str) -> str:
    """The type weights, activations and KV will have."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else model.dtype


def weight_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of all parameters, from the model's numbers alone."""
    return count_parameters(model) * DTYPE_BYTES[dtype]


def count_parameters(model: ModelConfig) -> int:
    """Parameters of the decoder; a tied embedding counts once."""
    m = model
    qkv = m.q_size + 2 * m.kv_size
    attention = m.hidden_size * (qkv + m.q_size)
    attention += qkv * m.qkv_bias + m.hidden_size * m.out_bias + 2 * m.head_dim * m.qk_norm
    mlp = 3 * m.hidden_size * m.intermediate_size
    mlp += (2 * m.intermediate_size + m.hidden_size) * m.mlp_bias
    layer = attention + mlp + 2 * m.hidden_size
    tables = m.vocab_size * m.hidden_size * (1 if m.tied_embeddings else 2)
    return m.num_layers * layer + tables + m.hidden_size


def settle(
    config: EngineConfig,
    model: ModelConfig,
    *,
    platform: str,
    capacity: int,
    kv_token_bytes: int,
    shards: int = 1,
) -> Sizes:
    """Turns settings and their defaults into sizes.

    Args:
      config: what the user set.
      model: the checkpoint's numbers.
      platform: "cpu", "gpu" or "tpu".
      capacity: memory of one device in bytes.
      kv_token_bytes: KV bytes of one token over all layers on one device, in the serving dtype.
      shards: devices the model is cut over; all figures are of one of them.

    Raises:
      InvalidConfig: settings that contradict each other, the model or the memory.
    """
    notes: list[str] = []
    defaults = _DEFAULTS.get(platform, _ACCELERATOR)
    dtype = serving_dtype(config, model, platform)
    if dtype != model.dtype:
        notes.append(f"weights are served in {dtype} (the checkpoint is {model.dtype})")
    num_seqs = config.max_num_seqs or defaults.num_seqs
    tokens = config.max_batched_tokens or max(defaults.batched_tokens, 2 * num_seqs)
    k = config.decode_steps
    ladder = make_ladder(num_seqs, tokens, max_programs=defaults.programs, max_k=k)
    longest = _longest(config, model)

    weights = weight_bytes(local_config(model, shards), dtype)
    if weights >= capacity:
        raise InvalidConfig(
            f"model: its weights take {weights:,} bytes in {dtype}, the device has {capacity:,}; "
            "choose a smaller dtype or a larger device"
        )
    page_bytes = kv_token_bytes * config.page_size
    if config.kv_memory is not None and weights + config.kv_memory > capacity:
        raise InvalidConfig(
            f"kv_memory: got {config.kv_memory:,} bytes, must be at most {capacity - weights:,}: "
            f"what the weights ({weights:,}) leave of the device's {capacity:,}"
        )
    pages = _pages(config, capacity - weights, page_bytes, num_seqs, longest)
    if (pages - 1) * config.page_size < longest:
        fits = (pages - 1) * config.page_size
        if config.max_model_len is not None or fits < 2:
            raise InvalidConfig(
                f"max_model_len: got {longest}, but {pages * page_bytes:,} bytes of KV memory hold "
                f"{max(fits, 0)} tokens; lower max_model_len or raise kv_memory"
            )
        notes.append(f"max_model_len is {fits}: what KV memory holds (the model allows {longest})")
        longest = fits

    per_seq = -(-longest // config.page_size)
    spec = RunnerSpec(
        num_slots=num_seqs,
        num_pages=pages,
        page_size=config.page_size,
        max_pages_per_seq=per_seq,
        max_model_len=longest,
        vocab_size=model.vocab_size,
        ladder=ladder,
        max_k=k,
    )
    return Sizes(
        dtype=dtype,
        spec=spec,
        prefill_chunk=min(config.prefill_chunk or tokens, tokens),
        weight_bytes=weights,
        kv_bytes=pages * page_bytes,
        slot_bytes=num_seqs * 4 * (SLOT_WORDS + per_seq),
        token_bytes=kv_token_bytes,
        capacity=capacity,
        notes=tuple(notes),
    )


def _longest(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence: what the user wants, at most what the checkpoint serves."""
    allowed = model.max_served_positions
    if config.max_model_len is None:
        return allowed
    if config.max_model_len > allowed:
        reason = (
            "dynamic rope scaling is served up to the original length"
            if model.rope.kind == "dynamic"
            else "max_position_embeddings"
        )
        raise InvalidConfig(
            f"max_model_len: got {config.max_model_len}, must be at most {allowed} ({reason})"
        )
    return config.max_model_len


def _pages(
    config: EngineConfig, beside_weights: int, page_bytes: int, num_seqs: int, longest: int
) -> int:
    """Pages in the slab, page 0 included."""
    if config.kv_memory is not None:
        return config.kv_memory // page_bytes
    wanted = 1 + num_seqs * -(-longest // config.page_size)
    return min(wanted, int(max(beside_weights, 0) * _KV_SHARE) // page_bytes)
