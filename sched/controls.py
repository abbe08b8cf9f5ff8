"""What reshapes a sequence's logits, as it goes to the device at each admission.

Called by plan_builder.py. The device counts output tokens by itself from then on; what it had
counted before a preemption is told again here, as `output`.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from ..model.plan import SlotControls
from .sequence import Sequence


def controls_of(seq: Sequence) -> SlotControls | None:
    """The controls of a sequence that was just given its slot; None if it has none."""
    sampling = seq.request.sampling
    if not sampling.controlled:
        return None
    tokens = np.array(seq.tokens, np.int32)
    return SlotControls(
        slot=seq.slot,
        prompt=tokens[: seq.prompt_len],
        output=tokens[seq.prompt_len :],
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sampling.logit_bias.items()),
        allowed=seq.allowed,
        bad_words=cast(tuple[tuple[int, ...], ...], sampling.bad_words),  # limits.py made sure
    )
