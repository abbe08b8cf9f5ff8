"""A runner without a device, which distrusts its scheduler.

It keeps slots and a slab as a device would, but in place of K/V it stores, for each position, which
position and token it came from and a hash of the whole history up to there. Before a row runs, the
fake walks its page table and checks that chain, so a page that was leaked, handed out twice, reused
too early or shared wrongly is seen at once. The next token is a function of that hash, the seed,
the choice, the token index and the slot's controls, so the answer to a request is known beforehand
(`expected_answer`), however it was batched, chunked, preempted or found in the prefix index.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from quire.model.ladder import Bucket, Ladder, Sampler
from quire.model.plan import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_BIASED_TOKENS,
    Emit,
    LogprobArrays,
    RunnerSpec,
    ScoredRow,
    SlotControls,
    SlotInit,
    StepOutputs,
    StepPlan,
)
from quire.sched.request import POOLED_SAMPLING, Request, SamplingParams

ROOT = 1469598103


def extend_hash(history: int, token: int) -> int:
    return (history * 1000003 + token * 7919 + 12345) & 0xFFFFFFFFFFFF


@dataclass
class Reshaped:
    """What controls do to the fake's next token: barred ones are passed over, and all else (the
    prompt, how often each token came, penalties, bias) is mixed into its hash."""

    controls: SlotControls
    output: list[int]

    @classmethod
    def of(cls, request: Request) -> Reshaped | None:
        """From the request, without the scheduler's help."""
        p = request.sampling
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        parts = (p.logit_bias, p.allowed_token_ids, p.bad_words)
        if penalties == (1, 0, 0) and not any(parts):
            return None
        allowed = p.allowed_token_ids
        return cls(
            SlotControls(
                slot=0,
                prompt=np.array(request.prompt, np.int32),
                output=np.zeros(0, np.int32),
                repetition_penalty=p.repetition_penalty,
                presence_penalty=p.presence_penalty,
                frequency_penalty=p.frequency_penalty,
                logit_bias=tuple(p.logit_bias.items()),
                allowed=None if allowed is None else np.array(allowed, np.int32),
                bad_words=p.bad_words,  # type: ignore[arg-type]
            ),
            [],
        )

    def digest(self) -> int:
        c = self.controls
        penalties = (c.repetition_penalty, c.presence_penalty, c.frequency_penalty)
        seen = (sorted(set(c.prompt.tolist())), sorted(Counter(self.output).items()))
        return zlib.crc32(repr((penalties, seen, sorted(c.logit_bias))).encode())

    def candidates(self, tokens: set[int]) -> set[int]:
        if self.controls.allowed is not None:
            tokens = tokens & set(self.controls.allowed.tolist())
        bad = {
            word[-1]
            for word in self.controls.bad_words
            if tuple(self.output[len(self.output) - len(word) + 1 :]) == word[:-1]
        }
        return tokens - bad or tokens


def next_token(
    history: int,
    seed: int,
    choice: int,
    index: int,
    vocab: int,
    stops: frozenset[int] = frozenset(),
    reshaped: Reshaped | None = None,
) -> int:
    """What the model says after a history; never one of `stops` if there is another."""
    stream = (seed * 0x9E3779B1) ^ (choice * 0xC2B2AE35) ^ (index * 0x85EBCA6B)
    tokens = set(range(vocab))
    if reshaped is not None:
        stream ^= reshaped.digest()
        tokens = reshaped.candidates(tokens)
    tokens = tokens - stops or tokens
    token = ((((history ^ stream) & 0xFFFFFFFFFFFF) * 2654435761) >> 13) % vocab
    while token not in tokens:
        token = (token + 1) % vocab
    return token


def score(history: int, token: int) -> float:
    """The fake's log-probability of a token after a history."""
    return -float((history ^ (token * 7919)) % 1024)


def embedding(history: int, poisoned: bool = False) -> np.ndarray:
    """The fake's pooled hidden state after a history: exact in float32, and different for each."""
    parts = [history & 0xFFFFFF, history >> 24]
    return np.array([np.nan, np.nan] if poisoned else parts, np.float32)


def expected_embedding(prompt: tuple[int, ...]) -> np.ndarray:
    history = ROOT
    for token in prompt:
        history = extend_hash(history, token)
    return embedding(history)


def expected_answer(
    request: Request, vocab: int, max_tokens: int, choice: int = 0
) -> tuple[list[int], int | None]:
    """The tokens of a choice that nobody interrupts, and the stop id that ends them."""
    sampling = request.sampling
    stops = frozenset(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        stops |= frozenset(request.eos_ids)
    history = ROOT
    for token in request.prompt:
        history = extend_hash(history, token)
    answer: list[int] = []
    reshaped = Reshaped.of(request)
    while len(answer) < max_tokens:
        barred = stops if len(answer) < sampling.min_tokens else frozenset()
        at = (sampling.seed or 0, choice, len(answer))
        token = next_token(history, *at, vocab, barred, reshaped)
        answer.append(token)
        if reshaped is not None:
            reshaped.output.append(token)
        if token in stops and len(answer) > sampling.min_tokens:
            return answer, token
        history = extend_hash(history, token)
    return answer, None


def expected_scores(request: Request) -> list[float | None]:
    """The log-probabilities of a request's prompt tokens."""
    history, scores = ROOT, []
    for token in request.prompt:
        scores.append(score(history, token))
        history = extend_hash(history, token)
    return [None, *scores[1:]]


def make_request(
    id: str = "a",
    prompt: tuple[int, ...] = (1, 2, 3),
    max_tokens: int | None = 4,
    *,
    eos_ids: tuple[int, ...] = (),
    priority: int = 0,
    deadline: float | None = None,
    cache_salt: str = "",
    tenant: str = "",
    adapter: int = 0,
    pooled: bool = False,
    **sampling: object,
) -> Request:
    params = {"seed": 0, "temperature": 0.0, **sampling}
    return Request(
        id=id,
        prompt=prompt,
        sampling=POOLED_SAMPLING if pooled else SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        eos_ids=eos_ids,
        priority=priority,
        deadline=deadline,
        cache_salt=cache_salt,
        tenant=tenant,
        adapter=adapter,
        pooled=pooled,
    )


def make_spec(
    *,
    slots: int = 4,
    pages: int = 33,
    page_size: int = 4,
    max_model_len: int = 64,
    vocab: int = 50,
    tokens: int = 32,
    max_k: int = 1,
) -> RunnerSpec:
    shapes = [(slots, slots), (max(tokens, slots + 1), slots)]
    rungs = [Bucket(t, r, s) for t, r in shapes for s in Sampler]
    if max_k > 1:
        rungs += [Bucket(slots, slots, s, max_k) for s in Sampler if s is not Sampler.FULL]
    return RunnerSpec(
        num_slots=slots,
        num_pages=pages,
        page_size=page_size,
        max_pages_per_seq=-(-max_model_len // page_size),
        max_model_len=max_model_len,
        vocab_size=vocab,
        ladder=Ladder(rungs),
        max_k=max_k,
    )


class DeviceFault(RuntimeError):
    """Raised where a test asked for it."""


@dataclass
class _Slot:
    generation: int = 0
    position: int = 0
    history: int = ROOT
    last: int = -1
    remaining: int = 0
    min_remaining: int = 0
    index: int = 0
    seed: int = 0
    choice: int = 0
    reshaped: Reshaped | None = None
    stops: frozenset[int] = frozenset()
    frozen: bool = True
    dry: int = 0  # decode rows in a row that gave nothing
    pages: dict[int, int] = field(default_factory=dict)


class FakeRunner:
    """Runs plans on the host, at launch, as a device that executes in order may.

    Args:
      spec: the sizes it enforces.
      rng: where given, decode rows bring 0 to k tokens at random, and rows may run past a stop.
      fail_launch, fail_collect: numbers of the calls (from 0) that raise DeviceFault.
      poison: (request's first prompt token) rows of such a slot come back not finite.
    """

    def __init__(
        self,
        spec: RunnerSpec,
        rng: random.Random | None = None,
        *,
        fail_launch: tuple[int, ...] = (),
        fail_collect: tuple[int, ...] = (),
    ):
        self.spec = spec
        self.rng = rng
        self.fail_launch = fail_launch
        self.fail_collect = fail_collect
        self.launches = 0
        self.collects = 0
        self.resets = 0
        self.poisoned_slots: set[int] = set()
        self._in_flight: list[StepOutputs] = []
        self._fresh()

    def _fresh(self) -> None:
        self.slots = [_Slot() for _ in range(self.spec.num_slots)]
        self.slab: dict[tuple[int, int], tuple[int, int, int]] = {}  # position, token, history

    def reset(self) -> None:
        self.resets += 1
        self._in_flight.clear()
        self._fresh()

    def launch(self, plan: StepPlan) -> StepOutputs:
        self.launches += 1
        if self.launches - 1 in self.fail_launch:
            raise DeviceFault("launch")
        outputs = self._run(plan)
        self._in_flight.append(outputs)
        return outputs

    def collect(self, handle: StepOutputs) -> StepOutputs:
        self.collects += 1
        if self.collects - 1 in self.fail_collect:
            raise DeviceFault("collect")
        assert self._in_flight.pop(0) is handle, "collected out of order"
        return handle

    # ---- one step

    def _run(self, plan: StepPlan) -> StepOutputs:
        self._check_shape(plan)
        controls = {c.slot: c for c in plan.controls}
        assert len(controls) == len(plan.controls)
        assert set(controls) == {init.slot for init in plan.inits if init.controlled}
        for init in plan.inits:
            self._init(init)
            if init.controlled:
                self._control(self.slots[init.slot], init, controls[init.slot])
        scored_rows = {scored.row: scored for scored in plan.scored}
        assert len(scored_rows) == len(plan.scored)
        scored_arrays: dict[int, LogprobArrays] = {}
        pooled: list[np.ndarray] = []
        for slot, index, page in plan.page_adds.tolist():
            assert 0 < page < self.spec.num_pages, "a page that may not be handed out"
            assert 0 <= index < self.spec.max_pages_per_seq
            assert index not in self.slots[slot].pages, "a page-table entry set twice"
            self.slots[slot].pages[index] = page
        tokens = np.full((plan.num_rows, plan.k), -1, np.int32)
        n_valid = np.zeros(plan.num_rows, np.int32)
        bad = np.zeros(plan.num_rows, bool)
        at = 0
        self._written: set[tuple[int, int]] = set()
        for row in range(plan.num_rows):
            number, start = int(plan.slots[row]), int(plan.starts[row])
            count, slot = int(plan.counts[row]), self.slots[number]
            full = plan.bucket.sampler is Sampler.FULL
            if plan.emits[row] == Emit.TOKEN and slot.reshaped is not None:
                assert full, "a controlled row emits in a program that knows no controls"
            if row < plan.num_decode:
                given = self._decode(slot, start, plan.k)
            else:
                chunk = plan.prompt_tokens[at : at + count].tolist()
                at += count
                if row in scored_rows:
                    scored_arrays[row] = self._score(slot, chunk, scored_rows[row])
                given = self._prefill(slot, start, chunk, Emit(int(plan.emits[row])))
                if plan.emits[row] == Emit.POOLED:
                    assert full and not plan.bucket.decode_only
                    pooled.append(embedding(self._read(slot), number in self.poisoned_slots))
            tokens[row, : len(given)] = given
            n_valid[row] = len(given)
            bad[row] = number in self.poisoned_slots
        logprobs = self._logprobs(tokens) if plan.bucket.sampler is Sampler.FULL else None
        scored_out = tuple(scored_arrays[scored.row] for scored in plan.scored)
        return StepOutputs(
            tokens, n_valid, bad, logprobs, scored_out, np.stack(pooled) if pooled else None
        )

    def _check_shape(self, plan: StepPlan) -> None:
        assert plan.bucket in self.spec.ladder.buckets
        assert plan.num_rows <= plan.bucket.rows and plan.num_tokens <= plan.bucket.tokens
        assert 1 <= plan.k <= self.spec.max_k and plan.k == plan.bucket.k
        assert plan.num_rows >= 1
        assert len(set(plan.slots.tolist())) == plan.num_rows, "a slot in two rows"
        assert (plan.counts[: plan.num_decode] == 1).all() and (plan.counts > 0).all()
        assert plan.counts[plan.num_decode :].sum() == len(plan.prompt_tokens)
        assert plan.num_decode == plan.num_rows or plan.k == 1
        if plan.scored:
            assert plan.bucket.sampler is Sampler.FULL and not plan.bucket.decode_only
            for scored in plan.scored:
                assert plan.num_decode <= scored.row < plan.num_rows, "only prompt rows are scored"
        for array in (plan.slots, plan.starts, plan.emits, plan.prompt_tokens, plan.page_adds):
            assert array.dtype == np.int32

    def _init(self, init: SlotInit) -> None:
        self.slots[init.slot] = _Slot(
            position=init.position,
            remaining=init.remaining,
            min_remaining=init.min_remaining,
            index=init.sample_index,
            seed=init.seed,
            choice=init.choice,
            stops=frozenset(init.stop_ids),
            frozen=False,
        )
        assert init.remaining > 0
        self.poisoned_slots.discard(init.slot)

    def _control(self, slot: _Slot, init: SlotInit, controls: SlotControls) -> None:
        vocab = self.spec.vocab_size
        assert controls.repetition_penalty > 0 and len(controls.prompt) > 0
        assert len(controls.output) == init.sample_index
        assert len(controls.logit_bias) <= MAX_BIASED_TOKENS
        assert controls.allowed is None or len(controls.allowed)
        assert len(controls.bad_words) <= MAX_BAD_WORDS
        assert all(0 < len(word) <= MAX_BAD_WORD_TOKENS for word in controls.bad_words)
        ids = [t for word in controls.bad_words for t in word]
        ids += [t for t, _ in controls.logit_bias]
        for array in (controls.prompt, controls.output, controls.allowed):
            if array is not None:
                assert array.dtype == np.int32
                ids += array.tolist()
        assert all(0 <= token < vocab for token in ids)
        slot.reshaped = Reshaped(controls, controls.output.tolist())

    def _score(self, slot: _Slot, chunk: list[int], scored: ScoredRow) -> LogprobArrays:
        """Before the row runs: the targets' log-probabilities."""
        targets = scored.targets.tolist()
        assert scored.targets.dtype == np.int32 and 0 < len(targets) <= len(chunk)
        history, chosen = self._read(slot), []
        for token, target in zip(chunk, targets, strict=False):
            history = extend_hash(history, token)
            chosen.append(score(history, target))
        arrays = self._logprobs(np.array(targets, np.int32)[:, None])
        return replace(arrays, chosen=np.array(chosen, np.float32)[:, None])

    def _prefill(self, slot: _Slot, start: int, chunk: list[int], emit: Emit) -> list[int]:
        assert not slot.frozen and slot.position == start, "a prompt chunk out of place"
        history = self._read(slot)
        for token in chunk:
            history = self._write(slot, token, history)
        if emit is not Emit.TOKEN:
            return []
        return [self._sample(slot, history)]

    def _decode(self, slot: _Slot, start: int, k: int) -> list[int]:
        if slot.frozen:
            return []
        assert slot.last >= 0, "a decode row before its prompt was done"
        assert start >= slot.position, "the host's position is no upper bound"
        room = min(k, slot.remaining)
        take = room
        if self.rng is not None and self.rng.random() < 0.5:
            take = self.rng.randint(1 if slot.dry >= 2 else 0, room)
        slot.dry = slot.dry + 1 if take == 0 else 0
        history, given = self._read(slot), []
        for _ in range(take):
            if slot.frozen:
                break
            history = self._write(slot, slot.last, history)
            given.append(self._sample(slot, history))
        if not slot.frozen:
            # As drafts that were refused would: what lies there must never be read.
            for position in range(slot.position, slot.position + room - len(given)):
                self.slab[self._place(slot, position)] = (-1, -1, -1)
        return given

    def _sample(self, slot: _Slot, history: int) -> int:
        barred = slot.stops if slot.min_remaining > 0 else frozenset()
        at = (slot.seed, slot.choice, slot.index)
        token = next_token(history, *at, self.spec.vocab_size, barred, slot.reshaped)
        if slot.reshaped is not None:
            slot.reshaped.output.append(token)
        slot.last = token
        slot.index += 1
        slot.remaining -= 1
        slot.min_remaining -= 1
        stopped = token in slot.stops and slot.min_remaining < 0
        stopped = stopped and (self.rng is None or self.rng.random() < 0.5)
        slot.frozen = slot.remaining == 0 or stopped
        return token

    def _place(self, slot: _Slot, position: int) -> tuple[int, int]:
        page = slot.pages.get(position // self.spec.page_size)
        assert page is not None, f"position {position} has no page"
        return page, position % self.spec.page_size

    def _write(self, slot: _Slot, token: int, history: int) -> int:
        place = self._place(slot, slot.position)
        assert place not in self._written, "two rows wrote the same place"
        self._written.add(place)
        history = extend_hash(history, token)
        self.slab[place] = (slot.position, token, history)
        slot.position += 1
        return history

    def _read(self, slot: _Slot) -> int:
        """The history behind a slot, after a check of every position of it."""
        history = ROOT
        for position in range(slot.position):
            kv = self.slab.get(self._place(slot, position))
            assert kv is not None, f"position {position} was never written"
            history = extend_hash(history, kv[1])
            assert kv == (position, kv[1], history), f"position {position} holds another's KV"
        return history

    def _logprobs(self, tokens: np.ndarray) -> LogprobArrays:
        """Of a token t: -t; its alternatives are 0, 1, 2, …"""
        rows, k = tokens.shape
        top = np.broadcast_to(np.arange(20, dtype=np.int32), (rows, k, 20))
        return LogprobArrays(
            chosen=-tokens.astype(np.float32),
            rank=tokens + 1,
            top_ids=top,
            top=-top.astype(np.float32),
        )
