"""bfloat16 and float16 serve what float32 serves, within the rounding of their type."""

from __future__ import annotations

import numpy as np
import pytest
import zoo
from harness import Bench

from quire import SamplingParams
from quire.sched.request import TokenLogprobs

CASE = zoo.BY_NAME["qwen3"]
ANSWER = SamplingParams(temperature=0, max_tokens=12, logprobs=20, ignore_eos=True)

# Largest difference among the 20 likeliest log-probabilities; activations are rounded some twenty
# times on the way, to 8 and 11 bits.
BOUNDS = {"bfloat16": 0.25, "float16": 0.03}


def answers(dtype: str) -> list[list[TokenLogprobs]]:
    """Per prompt the tokens of its answer with their log-probabilities: the first come from prompt
    chunks, the rest from decode steps."""
    folder, _ = zoo.get(CASE)
    session = Bench(folder, dtype=dtype).engine(budget=64)
    session.answers(zoo.prompts(), ANSWER)
    return [
        [entry for output in session.outputs[str(i)] for entry in output.logprobs or ()]
        for i in range(len(zoo.prompts()))
    ]


def differences(narrow: list[TokenLogprobs], wide: list[TokenLogprobs]) -> list[float]:
    """Of one answer, as far as both chose the same tokens: beyond, they are about other texts."""
    found: list[float] = []
    for ours, theirs in zip(narrow, wide, strict=True):
        exact = dict(theirs.top)
        found += [abs(value - exact[token]) for token, value in ours.top if token in exact]
        if ours.token != theirs.token:
            break
    return found


@pytest.fixture(scope="module")
def exact() -> list[list[TokenLogprobs]]:
    return answers("float32")


@pytest.mark.xdist_group("dtypes")
@pytest.mark.parametrize("dtype", BOUNDS)
def test_narrow_types_stay_close_to_float32(exact, dtype, capsys):
    pairs = list(zip(answers(dtype), exact, strict=True))
    found = [d for narrow, wide in pairs for d in differences(narrow, wide)]
    with capsys.disabled():
        print(
            f"\n{dtype}: {len(found)} log-probs, worst {max(found):.4f}, mean {np.mean(found):.4f}"
        )
    # Greedy answers may part where two tokens are all but equally likely, not at once.
    assert len(found) > 20 * 3 * len(pairs)
    assert 0 < max(found) < BOUNDS[dtype]
    assert np.mean(found) < BOUNDS[dtype] / 4
