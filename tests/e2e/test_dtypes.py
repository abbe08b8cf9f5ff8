"""bfloat16 and float16 serve what float32 serves, within the rounding of their type."""

from __future__ import annotations

import numpy as np
import pytest
import zoo
from harness import Bench

from quire import SamplingParams

CASE = zoo.BY_NAME["qwen3"]
FIRST = SamplingParams(temperature=0, max_tokens=1, logprobs=20)

# Largest difference among the 20 likeliest log-probabilities; activations are rounded some twenty
# times on the way, to 8 and 11 bits.
BOUNDS = {"bfloat16": 0.25, "float16": 0.03}


def first_logprobs(dtype: str) -> list[dict[int, float]]:
    folder, _ = zoo.get(CASE)
    session = Bench(folder, dtype=dtype).engine(budget=64)
    session.answers(zoo.prompts(), FIRST)
    entries = [session.outputs[str(i)][-1].logprobs[0] for i in range(len(zoo.prompts()))]
    return [dict(entry.top) for entry in entries]


@pytest.fixture(scope="module")
def exact() -> list[dict[int, float]]:
    return first_logprobs("float32")


@pytest.mark.xdist_group("dtypes")
@pytest.mark.parametrize("dtype", BOUNDS)
def test_narrow_types_stay_close_to_float32(exact, dtype):
    differences = [
        abs(value - wide[token])
        for narrow, wide in zip(first_logprobs(dtype), exact, strict=True)
        for token, value in narrow.items()
        if token in wide
    ]
    assert len(differences) > 100
    assert 0 < max(differences) < BOUNDS[dtype]
    assert np.mean(differences) < BOUNDS[dtype] / 4
