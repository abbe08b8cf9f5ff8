"""Ragged paged attention on GPUs, by Quire's own Pallas kernels.

Decode rows go through gpu_decode.py, or gpu_stream.py where they are few, prompt rows through
gpu_prefill.py, which fills its tokens into the array that the first has begun; gpu_pallas.py holds
what they share. All are lowered through Triton. On Hopper, gpu_mosaic.py stands in for
gpu_prefill.py in steps of many tokens. Page counts and lengths are data: one program serves any of
them.

`attend` needs a GPU; `attend_interpreted` is the same evaluated as plain JAX, for tests.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from .. import switches
from . import gpu_mosaic, gpu_stream
from .contract import Extras, Options, RaggedBatch
from .gpu_decode import DecodeShape, decode
from .gpu_mosaic import MosaicShape
from .gpu_pallas import Heads
from .gpu_prefill import PrefillShape, prefill
from .gpu_stream import StreamShape

FEW_ROWS = 8
"""Rows of a decode step up to which its kernel is gpu_stream.py. On an H200 that takes 6.1 us for
one row of 192 tokens where gpu_decode.py takes 9.0, and 19 against 25 for one of 8,192; for 64 rows
of 272 25.8 against 23.9, and for 256 of Qwen's 32 against 26."""

FEW_PROMPT_ROWS = 64
"""The same of a step with prompts, most of whose rows are prompts': where none decodes it takes
4.6 us, and the other 7.1."""


def _stream_shape(heads: Heads) -> StreamShape:
    """What was fastest on an H200 with few rows; other types need more registers."""
    if heads.compute == jnp.float32:
        return StreamShape(num_warps=4, num_stages=3 if heads.dims <= 128 else 2)
    if heads.dims > 128:
        return StreamShape(num_warps=4, num_stages=3)
    return StreamShape(block=64, num_warps=4, num_stages=3, programs=2 * 132)


def _decode_by(rows: int, alone: bool) -> Literal["items", "stream"]:
    """The kernel for decode rows of a step with room for so many rows."""
    return "stream" if rows <= (FEW_ROWS if alone else FEW_PROMPT_ROWS) else "items"


def _decode_shape(heads: Heads) -> DecodeShape:
    """What was fastest on an H200 (docs/measurements); other types need more registers."""
    if heads.compute == jnp.float32:
        return DecodeShape(num_warps=4, num_stages=3 if heads.dims <= 128 else 2)
    if heads.dims > 128:
        return DecodeShape(num_warps=4, num_stages=3)
    return DecodeShape()


_FEW_TOKENS = 256
"""Of a step, up to which tiles of many queries would be mostly empty, or too few."""


def _prefill_shape(heads: Heads, num_tokens: int) -> PrefillShape:
    """What was fastest on an H200, but for few tokens, where none has compared any yet; in float32,
    which no tensor core multiplies in full, small."""
    if heads.compute == jnp.float32:
        return PrefillShape(queries=16, block=32, num_warps=4, num_stages=2)
    if heads.dims > 128:
        return PrefillShape(queries=64, block=32, num_warps=4, num_stages=2)
    if num_tokens <= _FEW_TOKENS:
        return PrefillShape(
            queries=64, block=64, num_warps=4, num_stages=3, programs=2 * 132, least_blocks=8
        )
    return PrefillShape(queries=128, block=64, num_warps=8, num_stages=3)


def _mosaic_shape() -> MosaicShape:
    return MosaicShape()


MOSAIC_TOKENS = 768
"""Of a step, from which on Mosaic's kernel takes the prompts: a whole chunk of one, and what a step
takes of one while others decode (BUSY_TOKENS). On an H200 it takes 0.65 of Triton's time for 2,048
tokens over 6,144 cached, 0.7 for a first 2,048 and for eight prompts of 250, and as much where 100
of 768 tokens are a prompt's. Fewer tokens are few of its tiles of 128 rows, each with a block or
two of keys: at 512 it would save 2 to 5 us a layer, a hundredth of the step; at 256 nothing, nor
for 16 to 64 tokens over 10,000. Lowering a program with it takes two thirds of a second more of a
processor, of which a start has one a rung."""


def _prompts_by(num_tokens: int) -> Literal["triton", "mosaic"]:
    """The kernel for the prompts of a step of this size where both can serve. Only the size of the
    rung is known when a program is traced, not what rows it will hold."""
    return switches.PROMPTS_BY if num_tokens >= MOSAIC_TOKENS else "triton"


def _attend(
    q: jax.Array,
    slab: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    options: Options,
    *,
    interpret: bool,
    prompts_by: Literal["triton", "mosaic"] | None = None,
    decode_by: Literal["items", "stream"] | None = None,
    merge_inside: bool | None = None,
    decode_shape: DecodeShape | StreamShape | None = None,
    prefill_shape: PrefillShape | MosaicShape | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See api.py. What is None follows from the step, and kernels/switches.py; the shapes are for
    tuning.

    Raises:
      NotImplementedError: a MosaicShape was given, and that kernel cannot serve.
    """
    if prefill_shape is None and not options.decode_only:
        if (prompts_by or _prompts_by(q.shape[0])) == "mosaic":
            prefill_shape = _mosaic_shape()
            if _why_not_mosaic(q, slab, extras, options, prefill_shape, interpret) is not None:
                prefill_shape = None
    elif isinstance(prefill_shape, MosaicShape):
        reason = _why_not_mosaic(q, slab, extras, options, prefill_shape, interpret)
        if reason is not None:
            raise NotImplementedError(f"prefill by Mosaic: cannot serve {reason}")
    # An argument, so that all layers of a program share one trace and one kernel.
    first_page = jnp.asarray(options.first_page, jnp.int32).reshape(1)
    return _traced_once(
        q, slab, batch, extras, first_page, options=replace(options, first_page=0),
        interpret=interpret,
        decode_by=decode_by or _decode_by(batch.kv_lens.shape[0], options.decode_only),
        merge_inside=merge_inside,
        decode_shape=decode_shape,
        prefill_shape=prefill_shape,
    )  # fmt: skip


def _why_not_mosaic(
    q: jax.Array,
    slab: jax.Array,
    extras: Extras,
    options: Options,
    shape: MosaicShape,
    interpret: bool,
) -> str | None:
    reason = gpu_mosaic.why_not(q, slab, extras, options, shape)
    return reason if interpret else reason or gpu_mosaic.why_not_here()


# Tracing and lowering a kernel takes longer than all else of a layer: under a `jit` of its own that
# is done once a program and not once a layer. XLA inlines the calls.
@partial(
    jax.jit,
    static_argnames=(
        "options",
        "interpret",
        "decode_by",
        "merge_inside",
        "decode_shape",
        "prefill_shape",
    ),
)
def _traced_once(
    q: jax.Array,
    slab: jax.Array,
    batch: RaggedBatch,
    extras: Extras,
    first_page: jax.Array,
    *,
    options: Options,
    interpret: bool,
    decode_by: Literal["items", "stream"],
    merge_inside: bool | None,
    decode_shape: DecodeShape | StreamShape | None,
    prefill_shape: PrefillShape | MosaicShape | None,
) -> tuple[jax.Array, jax.Array]:
    num_tokens, num_heads, head_dim = q.shape
    page_size, kv_heads = slab.shape[1], slab.shape[2] // 2
    if slab.size > 2**31 >= slab.size * slab.dtype.itemsize // 2:
        # Pallas counts elements in 32 bits up to 4 GiB, which only one-byte types outgrow.
        raise NotImplementedError(
            f"slab: {slab.dtype} of {slab.size} elements, on GPUs must be at most {2**31} or "
            f"above {2**32}"
        )
    heads = Heads(
        num_kv_heads=kv_heads,
        group=num_heads // kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        max_pages=batch.page_table.shape[1],
        scale=options.scale,
        soft_cap=options.soft_cap,
        window=options.window,
        compute=_compute_dtype(q.dtype, slab.dtype),
        interpret=interpret,
    )
    if decode_shape is None:
        decode_shape = _stream_shape(heads) if decode_by == "stream" else _decode_shape(heads)
    if isinstance(decode_shape, DecodeShape) and merge_inside is not None:
        decode_shape = replace(decode_shape, merge_inside=merge_inside)
    queries = q.reshape(num_tokens, kv_heads, heads.group, head_dim)
    tokens = slab.reshape(-1, 2 * kv_heads, head_dim)
    args = queries, tokens, first_page, batch, extras, heads
    if isinstance(decode_shape, StreamShape):
        out = gpu_stream.decode(*args, decode_shape, alone=options.decode_only)
    else:
        out = decode(*args, decode_shape, alone=options.decode_only)
    if options.decode_only:
        pass
    elif isinstance(prefill_shape, MosaicShape):
        out = gpu_mosaic.prefill(queries, slab, first_page, batch, heads, prefill_shape, out)
    else:
        shape = prefill_shape or _prefill_shape(heads, num_tokens)
        out = prefill(queries, tokens, first_page, batch, extras, heads, shape, out)
    o, lse = out
    return o.reshape(q.shape), lse.reshape(q.shape[:2])


def _compute_dtype(q: jnp.dtype, slab: jnp.dtype) -> jnp.dtype:
    """What both products multiply in: the type of the queries if it holds the cache's values."""
    return q if slab == q or slab.itemsize == 1 else jnp.dtype(jnp.float32)


attend = partial(_attend, interpret=False)
attend_by_triton = partial(_attend, interpret=False, prompts_by="triton")
attend_by_mosaic = partial(_attend, interpret=False, prompts_by="mosaic")
attend_merging_inside = partial(_attend, interpret=False, decode_by="items", merge_inside=True)
attend_by_stream = partial(_attend, interpret=False, decode_by="stream")
attend_interpreted = partial(
    _attend, interpret=True, prompts_by="triton", decode_by="items", merge_inside=False
)
attend_interpreted_mosaic = partial(_attend, interpret=True, prompts_by="mosaic")
attend_interpreted_merging_inside = partial(attend_interpreted, merge_inside=True)
attend_interpreted_by_stream = partial(attend_interpreted, decode_by="stream")
