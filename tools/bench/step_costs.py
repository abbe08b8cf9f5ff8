"""What a step takes on an H200 with Llama-3.1-8B in bfloat16, by a model of it. Used by replay.py,
which plays traces in virtual time.

The model is fitted by hand to kernels' times in profiles of decode steps, prompts and mixtures
(`quire bench profile`), and held against whole traces (docs/performance.md says how near it came):
matrix products by the rung's tokens, small kernels by its tokens and rows, what decode rows read of
the cache at the rate the decode kernel reaches, attention of prompts by pairs of tokens, and what
the device waits between steps.
"""

from __future__ import annotations

from bisect import bisect_right

from .step_clock import Work

_PRODUCTS = (
    (1, 3.80), (32, 3.97), (64, 4.24), (128, 4.47), (192, 5.6), (256, 6.71), (384, 9.0),
    (512, 11.2), (768, 16.0), (1024, 20.6), (1536, 31.4), (2048, 42.1), (4096, 83.4),
)  # fmt: skip
"""(tokens, milliseconds) of all matrix products, the logits of as many rows among them."""

KV_BYTES = 131_072
"""Of a token, in all layers."""

_READ = 3.4e9
"""Bytes of the cache that decode rows read in a millisecond."""

_PAIRS = 0.66e6
"""Pairs of tokens that attention of prompts does in a millisecond."""

_TILE = 64
"""Tokens that a prompt's attention does at least, and by which it is rounded up."""


def milliseconds(work: Work) -> float:
    """Of a step that samples greedily, from the step before it on."""
    bucket = work.bucket
    ms = _products(bucket.tokens) + 0.33 + 0.0013 * bucket.tokens + 0.1
    if work.decode_rows:
        ms += 0.1 + work.decode_reads * KV_BYTES / _READ
    prompt_rows = work.rows - work.decode_rows
    if prompt_rows:
        prompt_tokens = work.tokens - work.decode_rows
        pairs = work.prompt_pairs + (prompt_tokens + _TILE * prompt_rows) * _TILE / 2
        ms += 0.2 + 0.0003 * bucket.rows + pairs / _PAIRS
    return ms


def _products(tokens: int) -> float:
    at = min(bisect_right(_PRODUCTS, (tokens, 0.0)), len(_PRODUCTS) - 1)
    (less, before), (more, after) = _PRODUCTS[max(at - 1, 0)], _PRODUCTS[at]
    if more == less:
        return after
    return before + (after - before) * (tokens - less) / (more - less)
