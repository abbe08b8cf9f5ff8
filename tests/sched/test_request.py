"""SamplingParams: what is refused, and what is made plain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quire.errors import InvalidRequest
from quire.sched.request import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", 5),
        ("stop", [5]),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["5"]),
        ("stop_token_ids", [True]),
        ("temperature", np.ones(2)),
        ("temperature", 10**400),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_k", np.ones(2)),
        ("top_k", 1.0),
        ("top_k", -2),
        ("seed", np.ones(1)),
        ("max_tokens", True),
        ("presence_penalty", np.ones(2)),
        ("repetition_penalty", None),
        ("repetition_penalty", 1.1),
        ("logit_bias", {5: 1.0}),
        ("logit_bias", np.ones(2)),
        ("bad_words", ["no"]),
        ("n", None),
        ("n", True),
        ("n", 2),
        ("best_of", 2),
        ("prompt_logprobs", 0),
    ],
)
def test_a_refusal_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: got "):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", np.int64(1)),
        ("best_of", 1),
        ("presence_penalty", np.float32(0)),
        ("frequency_penalty", 0),
        ("repetition_penalty", 1),
        ("logit_bias", {}),
        ("bad_words", []),
        ("allowed_token_ids", []),
        ("stop", None),
        ("stop_token_ids", None),
        ("top_k", -1),
    ],
)
def test_what_asks_for_nothing_is_the_default(field: str, value: Any) -> None:
    assert SamplingParams(**{field: value}) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value", "plain"),
    [
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.int64(1), 1.0),
        ("top_p", np.float64(0.25), 0.25),
        ("top_k", np.int32(7), 7),
        ("top_k", np.int32(-1), 0),
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("max_tokens", np.int64(9), 9),
        ("min_tokens", np.int64(3), 3),
        ("logprobs", np.int64(2), 2),
        ("stop", ["a"], ("a",)),
        ("stop_token_ids", np.array([4, 5]), (4, 5)),
    ],
)
def test_numbers_of_other_kinds_are_made_plain(field: str, value: Any, plain: Any) -> None:
    got = getattr(SamplingParams(**{field: value}), field)
    assert (got, type(got)) == (plain, type(plain))
    if isinstance(got, tuple):
        assert [type(item) for item in got] == [type(item) for item in plain]
