"""The contract between the scheduler (host) and the runner (device). No JAX here.

The scheduler decides which tokens run next and says so in a `StepPlan`; a `Runner` launches it and
hands back `StepOutputs` one step later. Everything in a plan is a host array or a plain tuple, so
the scheduler can be tested against a fake runner in microseconds.

    Scheduler.schedule() -> StepPlan -> Runner.launch(plan) -> handle
    Scheduler.update(plan, Runner.collect(handle) -> StepOutputs)

Vocabulary:
  slot        an index into device state that a running request owns (`Slots` in model/slots.py).
  generation  how many times that slot was handed out; a result of an older generation is dropped.
  row         what one slot does in one step: one decode token, or a chunk of its prompt.
  page        a fixed number of token positions in the KV slab; page 0 is never handed out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .ladder import Bucket, Ladder, Sampler

__all__ = [
    "MAX_BAD_WORDS",
    "MAX_BAD_WORD_TOKENS",
    "MAX_BIASED_TOKENS",
    "MAX_LOGPROBS",
    "MAX_STOP_IDS",
    "Bucket",
    "Emit",
    "Ladder",
    "LogprobArrays",
    "Runner",
    "RunnerSpec",
    "Sampler",
    "ScoredRow",
    "SlotControls",
    "SlotInit",
    "StepHandle",
    "StepOutputs",
    "StepPlan",
]

MAX_STOP_IDS = 16
"""Stop and end-of-sequence token ids one slot can hold on the device."""

MAX_LOGPROBS = 20
"""Most alternatives whose log-probabilities one token can carry."""

MAX_BIASED_TOKENS = 300
"""Entries of one request's logit_bias."""

MAX_BAD_WORDS = 64
"""Token sequences one request can forbid."""

MAX_BAD_WORD_TOKENS = 8
"""Tokens of a forbidden sequence at most."""

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]


class Emit(IntEnum):
    """What a row gives back."""

    NONE = 0
    """Nothing: a chunk in the middle of a prompt."""
    TOKEN = 1
    """The next token (up to k of them), sampled at the row's last position."""
    POOLED = 2
    """The hidden state after the final norm at the row's last position, scaled to length 1."""


@dataclass(frozen=True, slots=True)
class SlotInit:
    """Device state of a slot at admission. Sampling parameters go up once, here.

    Attributes:
      slot: the slot to initialise.
      position: tokens whose KV already lies in the slot's pages (a prefix hit).
      remaining: tokens the device may still emit before it freezes the slot.
      min_remaining: how many of the next tokens must not be a stop id.
      sample_index: index of the next output token (above 0 after a preemption).
      seed: 64-bit seed; the random stream depends on (seed, choice, sample_index) alone.
      choice: which of a request's n answers this is.
      temperature: 0 means greedy.
      top_k: 0 means off.
      top_p: 1.0 means off.
      min_p: 0.0 means off.
      stop_ids: at most MAX_STOP_IDS token ids that end the request.
      adapter: index of a LoRA adapter; 0 is the base model.
      controlled: a `SlotControls` of the same plan goes with it; only FULL programs look at those.
    """

    slot: int
    position: int
    remaining: int
    min_remaining: int = 0
    sample_index: int = 0
    seed: int = 0
    choice: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    adapter: int = 0
    controlled: bool = False


@dataclass(frozen=True, slots=True)
class SlotControls:
    """What reshapes a slot's logits besides temperature and truncation. Goes up at admission.

    Applied to the raw logits in this order: repetition, frequency and presence penalties, bias,
    allowed ids, bad words (each of the last two sets logits to -inf).

    Attributes:
      slot: the slot, initialised by the same plan with `controlled`.
      prompt: the prompt's token ids; repetition counts them as seen, presence and frequency do not.
      output: output tokens there are already (after a preemption).
      repetition_penalty: above 0; logits of seen tokens are divided by it if positive, multiplied
        if negative (arXiv:1909.05858). 1.0 is off.
      presence_penalty: subtracted once from each token of the output.
      frequency_penalty: subtracted once for each time a token is in the output.
      logit_bias: at most MAX_BIASED_TOKENS (token id, what is added to its logit).
      allowed: no other token may be emitted; None allows all.
      bad_words: at most MAX_BAD_WORDS sequences of 1 to MAX_BAD_WORD_TOKENS token ids; the last
        token of one may not follow the others in the output.
    """

    slot: int
    prompt: IntArray  # [P]
    output: IntArray  # [O]
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: IntArray | None = None  # [A]
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A prompt row of which the log-probabilities of given next tokens are wanted.

    `targets[i]` is scored by the distribution after the row's i-th token; there are at most as many
    targets as the row has tokens (the last chunk of a prompt has one less).
    """

    row: int
    targets: IntArray  # [N]


def _no_ints(*shape: int) -> IntArray:
    return np.zeros(shape, np.int32)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Decode rows come first, then prompt chunks; all arrays are read-only by contract.

    The order in which the device applies a plan: page copies, slot initialisation, page-table
    additions, then for each layer all K/V writes before any attention, then sampling.

    A decode row's input token and position are on the device; `starts` is the host's upper bound
    there. For a prompt row `starts` is exact.
    """

    slots: IntArray  # [R] which slot each row runs
    generations: IntArray  # [R] the slot's generation, echoed for whoever collects
    starts: IntArray  # [R] first position of the row (upper bound for decode rows)
    counts: IntArray  # [R] tokens in the row; decode rows have 1
    emits: IntArray  # [R] an Emit each; POOLED is for prompt rows, and needs a FULL bucket
    num_decode: int  # rows [0, num_decode) are decode rows
    bucket: Bucket  # the step program to run; holds at least sum(counts) tokens and R rows
    prompt_tokens: IntArray = field(default_factory=lambda: _no_ints(0))  # [sum of prompt counts]
    page_adds: IntArray = field(default_factory=lambda: _no_ints(0, 3))  # [A, (slot, index, page)]
    page_copies: IntArray = field(default_factory=lambda: _no_ints(0, 2))  # [C, (src, dst)]
    inits: tuple[SlotInit, ...] = ()
    controls: tuple[SlotControls, ...] = ()
    scored: tuple[ScoredRow, ...] = ()  # needs a FULL bucket
    k: int = 1  # tokens each decode row may emit in this dispatch; the bucket's k

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return self.num_decode + len(self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class LogprobArrays:
    """Natural logs of the raw distribution, before penalties, temperature and truncation.

    For scored rows R is the number of targets, and K is 1.
    """

    chosen: FloatArray  # [R, K] of the emitted token
    rank: IntArray  # [R, K] 1 = the most likely
    top_ids: IntArray  # [R, K, MAX_LOGPROBS] most likely first
    top: FloatArray  # [R, K, MAX_LOGPROBS]


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What a step gave, row for row as in its plan.

    `tokens[i, :n_valid[i]]` are row i's new tokens; `n_valid` is 0 for rows that emit nothing and
    for slots that had frozen. Tokens may run past a stop the device does not know: the scheduler
    drops them.
    """

    tokens: IntArray  # [R, K]
    n_valid: IntArray  # [R] 0..K
    not_finite: NDArray[np.bool_]  # [R] the row's logits held an inf or NaN
    logprobs: LogprobArrays | None = None  # when the bucket's sampler is FULL
    scored: tuple[LogprobArrays, ...] = ()  # one for each of the plan's scored rows
    pooled: FloatArray | None = None  # [P, E] of the rows that emit POOLED, in order, if any do


@dataclass(frozen=True, slots=True)
class RunnerSpec:
    """The sizes a scheduler must stay within.

    Attributes:
      num_slots: running requests at most.
      num_pages: pages in the slab, page 0 included (which is never handed out).
      page_size: token positions in a page.
      max_pages_per_seq: width of a page-table row.
      max_model_len: longest prompt plus output, in tokens.
      vocab_size: token ids are below this.
      ladder: the compiled step programs.
      max_k: most tokens a decode row may emit in one dispatch.
    """

    num_slots: int
    num_pages: int
    page_size: int
    max_pages_per_seq: int
    max_model_len: int
    vocab_size: int
    ladder: Ladder
    max_k: int = 1


class StepHandle(Protocol):
    """A launched step whose outputs have not been read yet."""


class Runner(Protocol):
    """Runs plans in the order they are launched."""

    @property
    def spec(self) -> RunnerSpec: ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Starts a step and returns at once, before the device is done."""
        ...

    def collect(self, handle: Any) -> StepOutputs:
        """Waits for a launched step. Each handle of `launch` is collected once, in launch order."""
        ...

    def reset(self) -> None:
        """Makes slabs and slots anew after a failed step; all KV is lost."""
        ...
