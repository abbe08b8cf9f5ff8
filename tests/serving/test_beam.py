"""Beam search: against all sequences there are, and against transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
from engines import SETTINGS, at_rest

from quire import LLM, BeamSearchParams
from quire.errors import InvalidRequest
from quire.serving.beam import BeamSearch

EOS = 2


def brute_force(table: np.ndarray, length: int, penalty: float) -> list[tuple[float, tuple]]:
    """(score, tokens) of every answer, best first; `table[last token]` are log-probabilities."""
    answers = {}
    for tokens in itertools.product(range(3), repeat=length):
        end = tokens.index(EOS) + 1 if EOS in tokens else length
        kept = tokens[:end]
        total = sum(table[a, b] for a, b in zip((0, *kept), kept, strict=False))
        answers[kept] = total / len(kept) ** penalty
    return sorted(((score, tokens) for tokens, score in answers.items()), reverse=True)


@pytest.mark.parametrize("penalty", [0.0, -1.0])
def test_a_wide_beam_finds_the_best_of_all_answers(penalty: float) -> None:
    """Nine beams over three tokens and three steps leave no continuation out."""
    for seed in range(40):
        logits = np.random.default_rng(seed).normal(size=(3, 3)) * 2
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        params = BeamSearchParams(beam_width=9, max_tokens=3, length_penalty=penalty)
        search = BeamSearch(params, [EOS])
        while search.live:
            lasts = [path.tokens[-1] if path.tokens else 0 for path in search.live]
            search.step([list(enumerate(table[last].tolist())) for last in lasts])
        score, path, reason = search.answers[0]
        expected, tokens = brute_force(table, 3, penalty)[0]
        assert path.tokens == tokens and score == pytest.approx(expected)
        assert reason == ("stop" if tokens[-1] == EOS else "length")


def test_it_ends_when_no_live_beam_can_do_better() -> None:
    def after(early_stopping: bool, penalty: float) -> int:
        params = BeamSearchParams(
            beam_width=1, max_tokens=9, early_stopping=early_stopping, length_penalty=penalty
        )
        search, steps = BeamSearch(params, [EOS]), 0
        while search.live:
            steps += 1
            # The end is likeliest in the first step, and never again.
            search.step([[(EOS, -0.5 if steps == 1 else -9.0), (0, -0.6 if steps == 1 else -0.01)]])
        return steps

    assert after(early_stopping=True, penalty=0.0) == 1
    assert after(early_stopping=False, penalty=0.0) == 1
    assert after(early_stopping=False, penalty=1.0) == 1  # -0.6 at length 1 is worse than -0.5


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"beam_width": 0}, "beam_width: got 0, must be a whole number from 1 to 10"),
        ({"beam_width": 11}, "beam_width: got 11"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"length_penalty": float("nan")}, "length_penalty: got nan"),
        ({"early_stopping": "never"}, "early_stopping: got 'never'"),
    ],
)
def test_what_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **given})


def test_prompts_are_checked_before_the_first_step(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    steps = llm.stats().steps
    with pytest.raises(InvalidRequest, match=r"prompt 1 of 2 .*max_tokens: got 4"):
        llm.beam_search([[1], [1] * (tiny_checkpoint.CONTEXT - 3)], params)
    with pytest.raises(InvalidRequest, match="params: got dict"):
        llm.beam_search([1], {"beam_width": 2})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="at most 4, because the model has 16 end-of-sequence"):
        BeamSearch(BeamSearchParams(beam_width=5, max_tokens=4), range(16))
    assert llm.stats().steps == steps


@pytest.mark.parametrize(("width", "penalty"), [(4, 1.0), (3, 0.0), (2, 2.0)])
def test_it_is_transformers_beam_search(tmp_path: Path, width: int, penalty: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Frequent tokens, so that beams end at different lengths.
    eos = [36, 64]
    folder = tiny_checkpoint.write(tmp_path, generation={"eos_token_id": eos})
    prompts = [[5, 80, 90, 71, 100, 82, 14, 60, 61, 62, 63, 70, 33, 34, 35, 65, 66], [7, 8, 9]]
    params = BeamSearchParams(beam_width=width, max_tokens=14, length_penalty=penalty)
    with LLM(folder, **SETTINGS) as llm:
        results = llm.beam_search(prompts, params)
        hits = llm.stats().prefix_hit_tokens
        at_rest(llm.parts.engine)
    assert hits > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, result in zip(prompts, results, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            length_penalty=penalty,
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = expected.sequences_scores.tolist()
        assert [beam.score for beam in result.sequences] == pytest.approx(scores, abs=1e-3)
        for beam, sequence in zip(result.sequences, expected.sequences.tolist(), strict=True):
            tokens = sequence[len(prompt) :]
            assert beam.token_ids == tokens[: len(beam.token_ids)]
            assert set(tokens[len(beam.token_ids) :]) <= {0}
            assert beam.finish_reason == ("stop" if beam.token_ids[-1] in eos else "length")
            assert beam.score == pytest.approx(
                beam.cumulative_logprob / len(beam.token_ids) ** penalty
            )
