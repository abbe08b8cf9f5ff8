"""Ragged paged attention: the one operation that serves decode, prefill and mixtures of both.

Callers: the model's attention layers, once per layer and step. This file holds the contract, checks
shapes, and picks a backend; the arithmetic is in the backends (see contract.py for adding one).
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, overload

import jax
import jax.numpy as jnp

from . import blockwise, gpu, reference, tpu
from .contract import Attend, Extras, Options, RaggedBatch

log = logging.getLogger(__name__)

BACKENDS: dict[str, Attend] = {
    "reference": reference.attend,
    "blockwise": blockwise.attend,
    "gpu": gpu.attend,
    "gpu_triton": gpu.attend_by_triton,  # these to compare kernels: for prompt rows,
    "gpu_mosaic": gpu.attend_by_mosaic,  # where that cannot serve, Triton does;
    "gpu_merge_inside": gpu.attend_merging_inside,  # and for decode rows
    "gpu_stream": gpu.attend_by_stream,
    "gpu_interpret": gpu.attend_interpreted,  # for tests: slow, on any device
    "gpu_mosaic_interpret": gpu.attend_interpreted_mosaic,  # likewise, on CPU
    "gpu_merge_inside_interpret": gpu.attend_interpreted_merging_inside,
    "gpu_stream_interpret": gpu.attend_interpreted_by_stream,
    "tpu": tpu.attend,
    "tpu_interpret": tpu.attend_interpreted,  # for tests, on CPU
}

# platforms with a backend of their own
_BY_PLATFORM = {"cpu": "blockwise", "gpu": "gpu", "tpu": "tpu"}
_FALLBACK = "blockwise"


@overload
def ragged_paged_attention(
    q: jax.Array,
    slab: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    num_decode: jax.Array,
    *,
    scale: float,
    first_page: jax.Array | int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    kv_scales: tuple[jax.Array | float, jax.Array | float] | None = None,
    return_lse: Literal[False] = False,
    decode_only: bool = False,
    backend: str | None = None,
) -> jax.Array: ...


@overload
def ragged_paged_attention(
    q: jax.Array,
    slab: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    num_decode: jax.Array,
    *,
    scale: float,
    first_page: jax.Array | int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    kv_scales: tuple[jax.Array | float, jax.Array | float] | None = None,
    return_lse: Literal[True],
    decode_only: bool = False,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]: ...


def ragged_paged_attention(
    q: jax.Array,
    slab: jax.Array,
    kv_lens: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    num_seqs: jax.Array,
    num_decode: jax.Array,
    *,
    scale: float,
    first_page: jax.Array | int = 0,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    kv_scales: tuple[jax.Array | float, jax.Array | float] | None = None,
    return_lse: bool = False,
    decode_only: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of each row's newest tokens over that row's cached pages.

    This step's K and V are in the slab already. Row s has q_len = cu_q_lens[s+1] - cu_q_lens[s]
    queries; query i of it stands at position p = kv_lens[s] - q_len + i and sees the positions
    j <= p, with a window only those j > p - window:

        logit_j = scale · q · (k_j · k_scale);  capped: soft_cap · tanh(logit_j / soft_cap)
        o = Σ_j exp(logit_j) · v_j · v_scale / (Σ_j exp(logit_j) + exp(sink))

    Query head h reads KV head h // (H / KH). Softmax and sums are float32 whatever the inputs are.

    A token that sees nothing gives zeros: one at or after cu_q_lens[num_seqs], or of a row whose
    kv_len is 0. What lies in pages and positions no token sees (NaN included) does not matter.

    Args:
      q: [T, H, D] float32, bfloat16 or float16.
      slab: [layers × pages, page, 2·KH, D], any float type; K head h at index 2h, V head h at
        2h + 1.
      kv_lens: [S] int32, cached tokens of each row, this step's included.
      page_table: [S, M] int32, page ids within the layer; 0 fills unused entries.
      cu_q_lens: [S+1] int32, ascending up to index num_seqs; later entries are ignored.
      num_seqs: int32 scalar; rows at and after it are empty.
      num_decode: int32 scalar, at most num_seqs; rows below it have one query each.
      scale: what q · k is multiplied by, usually D ** -0.5.
      first_page: layer × pages; added to every page id. An int, or int32 [1], so that layers may
        share a trace.
      window: how many positions a token sees, its own included; None is all.
      soft_cap: bound of the logits; None is none.
      sinks: [H] one more logit per head, in the denominator only.
      kv_scales: (k_scale, v_scale) of a quantized slab, each a scalar or [KH].
      return_lse: also return the log of the denominator above (the sink included).
      decode_only: a promise that num_decode == num_seqs; needs T == S, and leaves the prompt part
        out of the program.
      backend: a key of BACKENDS; None picks by platform.

    Returns:
      o [T, H, D] in q.dtype; with `return_lse` also lse [T, H] float32, -inf where a token sees
      nothing (the sink alone where a row has one).

    Raises:
      ValueError: shapes, types or static options that contradict the above.
    """
    batch = RaggedBatch(kv_lens, page_table, cu_q_lens, num_seqs, num_decode)
    options = Options(float(scale), first_page, window, soft_cap, decode_only, return_lse)
    _check(q, slab, batch, sinks, options)
    num_heads, num_kv_heads = q.shape[1], slab.shape[2] // 2
    k_scale, v_scale = (None, None) if kv_scales is None else kv_scales
    extras = Extras(
        _per_head("sinks", sinks, num_heads),
        _per_head("kv_scales[0]", k_scale, num_kv_heads),
        _per_head("kv_scales[1]", v_scale, num_kv_heads),
    )
    name = default_backend(jax.default_backend()) if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, must be one of {', '.join(BACKENDS)}")
    with jax.named_scope("attention"):
        out, lse = BACKENDS[name](q, slab, batch, extras, options)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


@functools.cache
def default_backend(platform: str) -> str:
    """The backend for "cpu", "gpu" or "tpu"; cached, so that a slow choice is said once."""
    if platform not in _BY_PLATFORM:
        log.warning("no attention kernel for %s yet: using the slower %s", platform, _FALLBACK)
    return _BY_PLATFORM.get(platform, _FALLBACK)


def _per_head(name: str, value: jax.Array | float | None, heads: int) -> jax.Array | None:
    """A scalar or [heads] as float32 [heads]."""
    if value is None:
        return None
    array = jnp.asarray(value, jnp.float32)
    if array.shape not in ((), (heads,)):
        raise ValueError(f"{name}: got shape {array.shape}, must be scalar or ({heads},)")
    return jnp.broadcast_to(array, (heads,))


def _check(
    q: jax.Array,
    slab: jax.Array,
    batch: RaggedBatch,
    sinks: jax.Array | None,
    options: Options,
) -> None:
    """Raises ValueError naming the argument, what it is and what it must be."""

    def demand(holds: bool, name: str, got: object, must: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {got}, must be {must}")

    demand(q.ndim == 3, "q", f"shape {q.shape}", "[T, H, D]")
    floats = (jnp.float32, jnp.bfloat16, jnp.float16)
    demand(q.dtype in floats, "q", q.dtype, "float32, bfloat16 or float16")
    num_tokens, num_heads, head_dim = q.shape
    demand(
        slab.ndim == 4 and slab.shape[2] > 0 and slab.shape[2] % 2 == 0,
        "slab",
        f"shape {slab.shape}",
        "[pages, page, 2·KH, D]",
    )
    demand(slab.shape[3] == head_dim, "slab", f"head dim {slab.shape[3]}", f"q's, {head_dim}")
    demand(jnp.issubdtype(slab.dtype, jnp.floating), "slab", slab.dtype, "a float type")
    num_kv_heads = slab.shape[2] // 2
    demand(
        num_heads > 0 and num_heads % num_kv_heads == 0,
        "q",
        f"{num_heads} heads",
        f"a multiple of the slab's {num_kv_heads} KV heads",
    )

    for name, array in batch._asdict().items():
        demand(jnp.dtype(array.dtype) == jnp.int32, name, array.dtype, "int32")
    kv_lens, page_table = batch.kv_lens, batch.page_table
    demand(
        kv_lens.ndim == 1 and kv_lens.size > 0, "kv_lens", f"shape {kv_lens.shape}", "[S], S > 0"
    )
    rows = kv_lens.shape[0]
    demand(
        page_table.ndim == 2 and page_table.shape[0] == rows and page_table.shape[1] > 0,
        "page_table",
        f"shape {page_table.shape}",
        f"[{rows}, M], M > 0",
    )
    cu_q_lens = batch.cu_q_lens
    demand(cu_q_lens.shape == (rows + 1,), "cu_q_lens", f"shape {cu_q_lens.shape}", f"[{rows + 1}]")
    for name in ("num_seqs", "num_decode"):
        shape = getattr(batch, name).shape
        demand(shape == (), name, f"shape {shape}", "a scalar")
    demand(num_tokens > 0, "q", "no tokens", "[T, H, D], T > 0")
    demand(
        not options.decode_only or num_tokens == rows,
        "decode_only",
        f"{num_tokens} tokens in {rows} rows",
        "as many tokens as rows",
    )

    demand(options.scale > 0, "scale", options.scale, "above 0")
    if isinstance(options.first_page, int):
        demand(
            0 <= options.first_page < slab.shape[0],
            "first_page",
            options.first_page,
            f"from 0 to below the slab's {slab.shape[0]} pages",
        )
    else:
        shape = options.first_page.shape
        demand(shape == (1,), "first_page", f"shape {shape}", "an int or of shape (1,)")
    demand(options.window is None or options.window >= 1, "window", options.window, "at least 1")
    demand(
        options.soft_cap is None or options.soft_cap > 0, "soft_cap", options.soft_cap, "above 0"
    )
    if sinks is not None:
        demand(sinks.shape == (num_heads,), "sinks", f"shape {sinks.shape}", f"[{num_heads}]")
