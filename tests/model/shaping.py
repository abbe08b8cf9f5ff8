"""What controls do to logits, stated plainly."""

from __future__ import annotations

import numpy as np


def shaped(logits, c):
    """Logits [V] under a `SlotControls`: its definition, in float64, token by token."""
    x = logits.astype(np.float64)
    output = c.output.tolist()
    for token in range(len(x)):
        count = output.count(token)
        if count or token in c.prompt:
            x[token] *= 1 / c.repetition_penalty if x[token] > 0 else c.repetition_penalty
        x[token] -= c.frequency_penalty * count + c.presence_penalty * (count > 0)
    for token, bias in c.logit_bias:
        x[token] += bias
    if c.allowed is not None:
        x[~np.isin(np.arange(len(x)), c.allowed)] = -np.inf
    before = x.copy()
    for *words, last in c.bad_words:
        if not words or output[-len(words) :] == words:
            x[last] = -np.inf
    return x if np.isfinite(x).any() else before
