"""How large an engine is: slots, tokens a step, pages, and the memory they take. Pure.

The page count follows from the configuration, the device's capacity and what the programs need to
work, never from what happens to be free at the moment: the same command makes the same programs
every time, and finds them stored. What programs need does not depend on the page count, so sizes
are settled twice: without it, to guess it or to compile the largest programs, and with it
(model/startup.py).
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import EngineConfig
from ..errors import InvalidConfig
from .config import DTYPE_BYTES, ModelConfig
from .ladder import MAX_PROGRAMS, Ladder, make_ladder
from .memory import CAPACITY_GRAIN, PLATFORMS, MemoryTable, coarse
from .parallel import local_config
from .plan import RunnerSpec
from .sampling.controls import controls_bytes
from .slots import SLOT_WORDS

_CPU_SHARE = 0.5
"""Of the host memory beside the weights, what an engine takes on CPU unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a platform gets when the user says nothing."""

    num_seqs: int
    batched_tokens: int
    programs: int


_DEFAULTS = {"cpu": Defaults(16, 256, 15)}  # compiling is slow there, padding cheap
_ACCELERATOR = Defaults(256, 2048, MAX_PROGRAMS)
_LARGE = Defaults(1024, 2048, MAX_PROGRAMS)
_LARGE_BYTES = 24 * 2**30
"""An accelerator's memory beside the weights, or what the user allows of it, from which on it is
large: more requests at once then raise what it does a second, and what they take besides pages,
about 2 GiB, is little of it."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """An engine's sizes, settled.

    Attributes:
      dtype: of weights, activations and KV.
      spec: what the scheduler must stay within.
      prefill_chunk: most tokens of one prompt in one step.
      token_bytes: KV of one token over all layers.
      memory: where the bytes of a device go.
      notes: what was decided in the user's stead, a sentence each.
    """

    dtype: str
    spec: RunnerSpec
    prefill_chunk: int
    token_bytes: int
    memory: MemoryTable
    notes: tuple[str, ...]


_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory() -> int:
    """Memory of this machine in bytes, or what the container we run in may use of it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            found.append(int(Path(name).read_text()))
    return min(found)


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


def largest_parameter_bytes(model: ModelConfig, dtype: str) -> int:
    """Bytes of the largest parameter as it is loaded: the embedding, or the MLP's fused matrix."""
    rows = max(model.vocab_size, 2 * model.intermediate_size, model.q_size + 2 * model.kv_size)
    return rows * model.hidden_size * DTYPE_BYTES[dtype]


def settle(
    config: EngineConfig,
    model: ModelConfig,
    *,
    platform: str,
    capacity: int,
    kv_token_bytes: int,
    shards: int = 1,
    pool: int | None = None,
    temp_bytes: int = 0,
    staging_bytes: int = 0,
) -> Sizes:
    """Turns settings and their defaults into sizes.

    Args:
      config: what the user set.
      model: the checkpoint's numbers.
      platform: "cpu", "gpu" or "tpu".
      capacity: memory of one device in bytes.
      kv_token_bytes: KV bytes of one token over all layers on one device, in the serving dtype.
      shards: devices the model is cut over; all figures are of one of them.
      pool: bytes that JAX may take of the device, where that is settled already.
      temp_bytes, staging_bytes: what the most demanding program needs beside its arguments, and the
        steps in flight; 0 while not known.

    Raises:
      InvalidConfig: settings that contradict each other, the model or the memory.
    """
    notes: list[str] = []
    dtype = serving_dtype(config, model, platform)
    if dtype != model.dtype:
        notes.append(f"weights are served in {dtype} (the checkpoint is {model.dtype})")
    weights = weight_bytes(local_config(model, shards), dtype)
    defaults = _defaults(platform, min(capacity, config.memory or capacity) - weights)
    page_size = config.page_size or PLATFORMS[platform].page_size
    num_seqs = config.max_num_seqs or defaults.num_seqs
    half = max(1, (config.max_batched_tokens or 2 * num_seqs) // 2)
    if config.max_num_seqs is None and half < num_seqs:
        num_seqs = half
        notes.append(f"max_num_seqs is {num_seqs}: half of max_batched_tokens")
    ladder = _ladder(config, defaults, num_seqs)
    chunk = min(config.prefill_chunk or ladder.max_tokens, ladder.max_tokens)
    if config.prefill_chunk is not None and config.prefill_chunk > chunk:
        notes.append(f"prefill_chunk is {chunk}: what a step holds (got {config.prefill_chunk})")
    longest = longest_wanted(config, model)
    if longest > model.max_served_positions:
        notes.append(
            f"max_model_len is {longest}, beyond the {model.max_served_positions} tokens that the "
            "checkpoint was made for: what it answers there may mean nothing"
        )

    table = MemoryTable(
        capacity=capacity - capacity % CAPACITY_GRAIN,
        budget=0,
        weights=weights,
        kv=0,
        slots=_slot_bytes(num_seqs, longest, page_size),
        controls=controls_bytes(num_seqs, model.vocab_size),
        temp=temp_bytes,
        staging=staging_bytes,
        reserve=PLATFORMS[platform].outside + PLATFORMS[platform].inside,
        rounding=PLATFORMS[platform].rounding,
        pages=0,
        page_size=page_size,
        host_mapped=weight_bytes(model, model.dtype),
        host_staging=2 * largest_parameter_bytes(model, dtype),
    )
    table = replace(table, budget=_budget(config, table, platform, dtype, pool))
    page_bytes = kv_token_bytes * page_size
    pages = _pages(config, table, page_bytes, num_seqs, longest)
    if (pages - 1) * page_size < longest:
        fits = (pages - 1) * page_size
        if fits < page_size and config.kv_memory is not None:
            raise InvalidConfig(
                f"kv_memory: got {config.kv_memory:,} bytes, must be at least {2 * page_bytes:,}: "
                f"two pages of {page_size} tokens"
            )
        if config.max_model_len is not None or fits < 2:
            raise InvalidConfig(
                f"max_model_len: got {longest}, but {pages * page_bytes:,} bytes of KV memory hold "
                f"{max(fits, 0)} tokens; lower max_model_len or raise {_kv_setting(config)}"
            )
        notes.append(f"max_model_len is {fits}: what KV memory holds (the model allows {longest})")
        longest = fits

    table = replace(
        table,
        kv=pages * page_bytes,
        pages=pages,
        slots=_slot_bytes(num_seqs, longest, page_size),
    )
    spec = RunnerSpec(
        num_slots=num_seqs,
        num_pages=pages,
        page_size=page_size,
        max_pages_per_seq=-(-longest // page_size),
        max_model_len=longest,
        vocab_size=model.vocab_size,
        ladder=ladder,
        max_k=config.decode_steps,
    )
    return Sizes(
        dtype=dtype,
        spec=spec,
        prefill_chunk=chunk,
        token_bytes=kv_token_bytes,
        memory=table,
        notes=tuple(notes),
    )


def _defaults(platform: str, beside_weights: int) -> Defaults:
    return _DEFAULTS.get(platform, _LARGE if beside_weights >= _LARGE_BYTES else _ACCELERATOR)


def _ladder(config: EngineConfig, defaults: Defaults, num_seqs: int) -> Ladder:
    tokens = config.max_batched_tokens or max(defaults.batched_tokens, 2 * num_seqs)
    k = config.decode_steps
    return make_ladder(num_seqs, tokens, max_programs=defaults.programs, max_k=k)


def _slot_bytes(num_seqs: int, longest: int, page_size: int) -> int:
    return num_seqs * 4 * (SLOT_WORDS + -(-longest // page_size))


def _budget(
    config: EngineConfig, table: MemoryTable, platform: str, dtype: str, pool: int | None
) -> int:
    """Bytes of the device for everything, which hold at least what is there before KV pages."""
    kind, least = PLATFORMS[platform], table.total
    needs = (
        f"{least:,} bytes without any KV: its weights take {table.weights:,} bytes in {dtype}, "
        f"programs and state {least - table.weights - table.reserve:,}, the reserve "
        f"{table.reserve:,}"
    )
    # JAX may have started with a pool of its own; what is beside it is ours all the same.
    most = table.capacity if pool is None else min(table.capacity, pool + kind.outside)
    if config.memory is not None:
        # The pool we asked for is a share of what the backend counts, a little off what we do.
        if config.memory > table.capacity or config.memory > 1.01 * most:
            raise InvalidConfig(
                f"memory: got {config.memory:,} bytes, must be at most {most:,}: what "
                + ("the device has" if most == table.capacity else "JAX was started with")
            )
        if min(config.memory, most) <= least:
            raise InvalidConfig(f"memory: got {config.memory:,} bytes, but the model takes {needs}")
        return min(config.memory, most)
    if least >= most:
        raise InvalidConfig(
            f"model: takes {needs}; the device has {most:,}; lower max_num_seqs or "
            "max_batched_tokens, choose a smaller dtype or a larger device"
        )
    if platform == "cpu":
        # With kv_memory the user has said what there is to say.
        share = 1.0 if config.kv_memory is not None else _CPU_SHARE
        return least + int((most - least) * share)
    return min(most, int(table.capacity * kind.share))


def _kv_setting(config: EngineConfig) -> str:
    return "kv_memory" if config.kv_memory is not None or config.memory is None else "memory"


def longest_wanted(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence: what the user wants, at most what the checkpoint serves unless that
    limit is lifted; memory may hold less (`settle`)."""
    allowed = model.max_served_positions
    if config.max_model_len is None:
        return allowed
    if config.max_model_len > allowed:
        # Its result there would depend on the history of the batch (model/rope.py).
        if model.rope.kind == "dynamic":
            reason = "dynamic rope scaling is served up to the original length"
        elif not config.lift_context_limit:
            reason = "max_position_embeddings; lift_context_limit lets it go beyond"
        else:
            return config.max_model_len
        raise InvalidConfig(
            f"max_model_len: got {config.max_model_len}, must be at most {allowed} ({reason})"
        )
    return config.max_model_len


def _pages(
    config: EngineConfig, table: MemoryTable, page_bytes: int, num_seqs: int, longest: int
) -> int:
    """Pages in the slab, page 0 included."""
    left = max(table.budget - table.total, 0)
    if config.kv_memory is not None:
        if config.kv_memory > left:
            of = "memory allows" if config.memory is not None else "there are"
            raise InvalidConfig(
                f"kv_memory: got {config.kv_memory:,} bytes, must be at most {left:,}: what the "
                f"weights ({table.weights:,}), programs, state and reserve "
                f"({table.total - table.weights:,}) leave of the {table.budget:,} bytes that {of}"
            )
        return config.kv_memory // page_bytes
    return min(1 + num_seqs * -(-longest // table.page_size), coarse(left // page_bytes))
