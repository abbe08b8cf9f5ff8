"""SamplingParams: what is refused, and what is made plain. What requests and plans derive fast."""

from __future__ import annotations

from dataclasses import MISSING, replace
from typing import Any

import numpy as np
import pytest

from quire.errors import InvalidRequest
from quire.model.plan import Sampler
from quire.sched import sampling_params
from quire.sched.plan_builder import StepBuilder
from quire.sched.request import Request
from quire.sched.sampling_params import SamplingParams


def test_defaults_need_no_check() -> None:
    """They are passed over (`_CHECKS`), so each must be what its check would make of it."""
    for name, default, made_plain in sampling_params._CHECKS:
        if default is not MISSING:
            made = made_plain(name, default)
            assert (made, type(made)) == (default, type(default)), name


def test_numbers_that_python_does_not_print_are_refused_too() -> None:
    for given in ({"seed": 10**5000}, {"stop_token_ids": [10**5000]}):
        with pytest.raises(InvalidRequest, match="too many digits"):
            SamplingParams(**given)


def test_a_seed_changes_nothing_else() -> None:
    given = SamplingParams(temperature=0.5, logit_bias={3: 1.0}, stop=["a"], max_tokens=None, n=2)
    seeded = given.with_seed(7)
    assert seeded == replace(given, seed=7) and given.seed is None
    assert seeded.logit_bias is not given.logit_bias
    assert seeded.seed == 7 and seeded.stop == ("a",) and seeded.logit_bias == {3: 1.0}


def test_no_bias_is_a_mapping_too() -> None:
    assert SamplingParams(logit_bias={}).logit_bias == {}
    with pytest.raises(InvalidRequest, match="logit_bias"):
        SamplingParams(logit_bias=[])  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 256, 257, 5000])
def test_the_largest_id_of_a_prompt_is_found_whatever_its_length(length: int) -> None:
    prompt = tuple(at * 7 % 5003 for at in range(length))
    for tokens in (prompt, prompt[::-1]):
        assert Request(id="a", prompt=tokens, sampling=SamplingParams()).highest == max(prompt)


@pytest.mark.parametrize("pages", [1, 31, 32, 33, 300])
def test_page_table_entries_are_listed_by_slot_and_index(pages: int) -> None:
    step = StepBuilder(1)
    step.pages(4, 2, [9])
    step.pages(7, 5, list(range(100, 100 + pages - 1)))
    expected = [(4, 2, 9), *((7, 5 + i, 100 + i) for i in range(pages - 1))]
    entries = step._table_entries()
    assert entries.dtype == np.int32 and entries.tolist() == [list(e) for e in expected]
    empty = StepBuilder(1)._table_entries()
    assert empty.dtype == np.int32 and empty.shape == (0, 3)


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
        ("temperature", True),  # equal to its default, as some others here
        ("max_tokens", 16.0),
        ("ignore_eos", 0),
        ("skip_special_tokens", np.True_),
        ("top_k", np.ones(2)),
        ("top_k", 1.0),
        ("top_k", -2),
        ("seed", np.ones(1)),
        ("max_tokens", True),
        ("presence_penalty", np.ones(2)),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", None),
        ("repetition_penalty", 0),
        ("repetition_penalty", 10.5),
        ("logit_bias", np.ones(2)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"5": 1.0}),
        (r"logit_bias\[5\]", {5: 101}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("allowed_token_ids", 5),
        ("bad_words", 5),
        ("bad_words", [5]),
        ("bad_words", [""]),
        ("bad_words", ["  "]),
        ("bad_words", ["x" * 257]),
        ("bad_words", [[]]),
        ("bad_words", [[1] * 9]),
        ("bad_words", [[n] for n in range(65)]),
        ("n", None),
        ("n", True),
        ("n", 0),
        ("n", 129),
        ("best_of", 0),
        ("best_of", 129),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_a_refusal_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: got "):
        SamplingParams(**{field.split("\\")[0]: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [object()] * 17),
        ("allowed_token_ids", [object()] * (2**20 + 1)),
        ("bad_words", [[object()] * 9]),
        ("stop", ["x" * 100_000]),
        ("bad_words", ["x" * 100_000]),
    ],
)
def test_what_is_too_long_is_refused_before_each_item_is_looked_at(field: str, value: Any) -> None:
    """And without being repeated: over gRPC a message must fit into trailers."""
    with pytest.raises(InvalidRequest, match=f"^{field}: got ") as caught:
        SamplingParams(**{field: value})
    assert len(str(caught.value)) < 1000
    assert "at most" in str(caught.value) or "characters" in str(caught.value)


def test_best_of_is_at_least_n() -> None:
    with pytest.raises(InvalidRequest, match=r"best_of: got 2, must be at least n \(3\)"):
        SamplingParams(n=3, best_of=2)
    made = SamplingParams(n=2, best_of=3)
    assert (made.choices, made.ranked, made.alternatives) == (3, True, 0)
    assert made.sampler is SamplingParams(logprobs=0).sampler is Sampler.FULL
    same = SamplingParams(n=2, best_of=2)
    assert (same.choices, same.ranked, same.alternatives) == (2, False, None)


@pytest.mark.parametrize(
    "controls",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias": {3: 0.0}},
        {"allowed_token_ids": [3]},
        {"bad_words": [[3]]},
    ],
)
def test_controls_need_the_full_sampler(controls: Any) -> None:
    params = SamplingParams(temperature=0.0, **controls)
    assert params.controlled and params.sampler is Sampler.FULL
    plain = SamplingParams(temperature=0.0, n=3, prompt_logprobs=2)
    assert not plain.controlled and plain.sampler is Sampler.GREEDY


def test_parameters_can_be_hashed_and_remade() -> None:
    params = SamplingParams(
        logit_bias={1: 2}, bad_words=["a", [1, 2], "a"], allowed_token_ids=[1, 1]
    )
    assert replace(params) == params and hash(replace(params)) == hash(params)
    assert (params.bad_words, params.allowed_token_ids) == (("a", (1, 2)), (1,))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", np.int64(1)),
        ("presence_penalty", np.float32(0)),
        ("frequency_penalty", 0),
        ("repetition_penalty", 1),
        ("logit_bias", {}),
        ("bad_words", []),
        ("allowed_token_ids", None),
        ("bad_words", None),
        ("logit_bias", None),
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
        ("n", np.int64(3), 3),
        ("best_of", np.int64(3), 3),
        ("prompt_logprobs", np.int8(0), 0),
        ("repetition_penalty", np.float32(1.5), 1.5),
        ("allowed_token_ids", np.array([4, 5]), (4, 5)),
        ("bad_words", "no", ("no",)),
        ("logit_bias", {np.int32(3): np.float32(1.5)}, {3: 1.5}),
        ("stop_token_ids", np.array([4, 5]), (4, 5)),
    ],
)
def test_numbers_of_other_kinds_are_made_plain(field: str, value: Any, plain: Any) -> None:
    got = getattr(SamplingParams(**{field: value}), field)
    assert (got, type(got)) == (plain, type(plain))
    if isinstance(got, tuple):
        assert [type(item) for item in got] == [type(item) for item in plain]
