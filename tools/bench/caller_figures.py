"""What callers of a server saw, as figures: time to first token, per token, between messages, end
to end; goodput. Used by serve.py and online.py."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .load import Served

LATE_MS = 10.0
"""Requests sent later than this, at the 99th percentile, say that the sender was too slow."""

PERCENTILES = (50, 90, 99)

IN_ENGINE = "ttft_engine_ms"
"""The part of the time to first token that passed in the server's engine."""


def figures_of(served: list[Served], goals: dict[str, float]) -> dict[str, Any]:
    """What the callers saw, in milliseconds.

    Args:
      served: all requests.
      goals: milliseconds by "ttft_ms", "tpot_ms", "e2e_ms"; a request that meets all, and got all
        its tokens, counts as good. A time per token that does not exist, for want of a second
        message, meets any.
    """
    import numpy as np

    whole = [request for request in served if request.whole]
    seconds = max(request.ended for request in served)
    samples = samples_of(served)
    figures: dict[str, Any] = {
        "requests": len(served),
        "errors": len(served) - len(whole),
        "first_errors": sorted({r.error or "tokens are missing" for r in served if not r.whole})[
            :3
        ],
        "seconds": seconds,
        "output_tok_s": sum(r.tokens for r in served) / seconds,
        "req_s": len(whole) / seconds,
        "tokens_per_message": (
            sum(r.tokens for r in whole) / max(sum(len(r.messages) for r in whole), 1)
        ),
        "prefix_hit_tokens": _hits(served),
        "late_ms_p99": 1e3 * float(np.percentile([r.sent - r.due for r in served], 99)),
    }
    for name, values in samples.items():
        if values:
            found = np.percentile(values, PERCENTILES)
            figures[name] = {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}
            figures[name]["mean"] = float(np.mean(values))
    if goals:
        good = sum(_is_good(request, goals) for request in whole)
        figures["slo"] = goals
        figures["goodput_req_s"] = good / seconds
        figures["good"] = good
    return figures


def _hits(served: list[Served]) -> int | None:
    """Prompt tokens that the server found instead of computing them; None if it does not say."""
    hits = [request.hit for request in served if request.hit is not None]
    return sum(hits) if hits else None


def samples_of(served: list[Served]) -> dict[str, list[float]]:
    """Milliseconds by kind, of the requests that got all their tokens."""
    whole = [request for request in served if request.whole]
    return {
        "ttft_ms": [1e3 * r.first for r in whole],
        IN_ENGINE: [1e3 * r.engine for r in whole if r.engine is not None],
        "tpot_ms": [1e3 * r.each for r in whole if not math.isnan(r.each)],
        "itl_ms": [1e3 * gap for r in whole for gap in r.gaps],
        "e2e_ms": [1e3 * (r.ended - r.due) for r in whole],
    }


def _is_good(request: Served, goals: dict[str, float]) -> bool:
    took = {
        "ttft_ms": 1e3 * request.first,
        "tpot_ms": 1e3 * request.each,
        "e2e_ms": 1e3 * (request.ended - request.due),
    }
    return not any(took[name] > most for name, most in goals.items())  # nan is above nothing
