"""A runner that computes nothing: every row that emits gets preset tokens, at once.

For `quire bench scheduler`, which measures the host alone. It trusts its scheduler; the runner of
tests/sched distrusts it, and costs more than what is measured here.
"""

from __future__ import annotations

import numpy as np

from ...model.ladder import make_ladder
from ...model.plan import Emit, RunnerSpec, StepOutputs, StepPlan

_TABLE = 64  # different steps' worth of tokens


class NullRunner:
    """A `Runner` (model/plan.py)."""

    def __init__(self, spec: RunnerSpec, seed: int = 0):
        self.spec = spec
        draw = np.random.default_rng(seed)
        shape = (_TABLE, spec.num_slots, spec.max_k)
        self._tokens = draw.integers(0, spec.vocab_size, shape, np.int32)
        self._at = 0

    def launch(self, plan: StepPlan) -> StepPlan:
        return plan

    def collect(self, handle: StepPlan) -> StepOutputs:
        """Decode rows get k tokens, prompt rows that emit get one."""
        plan, rows = handle, handle.num_rows
        valid = (plan.emits == Emit.TOKEN).astype(np.int32)
        valid[: plan.num_decode] *= plan.k
        self._at = (self._at + 1) % _TABLE
        return StepOutputs(
            tokens=self._tokens[self._at, :rows, : plan.k],
            n_valid=valid,
            not_finite=np.zeros(rows, np.bool_),
        )

    def reset(self) -> None:
        pass


def null_spec(rows: int, *, page_size: int, max_model_len: int, pages: int) -> RunnerSpec:
    """The sizes of an engine with `rows` slots and the default ladder, for a large vocabulary."""
    return RunnerSpec(
        num_slots=rows,
        num_pages=pages,
        page_size=page_size,
        max_pages_per_seq=-(-max_model_len // page_size),
        max_model_len=max_model_len,
        vocab_size=128_256,
        ladder=make_ladder(rows, max(2048, 2 * rows)),
    )
