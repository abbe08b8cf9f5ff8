"""What is refused, and what the refusal says."""

import pytest
from fake_runner import make_request, make_spec

from quire.errors import InvalidRequest
from quire.sched.limits import check_request, context_limit, resolve_max_tokens

SPEC = make_spec(pages=33, page_size=4, max_model_len=64, vocab=50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ()}, "prompt: got 0 tokens"),
        ({"prompt": (1, 50)}, r"prompt\[1\]: got 50, must be whole numbers from 0 to 49"),
        ({"prompt": (-1,)}, r"prompt\[0\]: got -1"),
        ({"prompt": (1, 2**70)}, r"prompt\[1\]"),
        ({"prompt": (1, 2, 1.5)}, r"prompt\[2\]: got 1.5"),
        ({"prompt": (1,) * 64, "max_tokens": None}, "got 64 tokens, must be at most 63.*64"),
        ({"prompt": (1,) * 60, "max_tokens": 5}, "max_tokens: got 5, must be at most 4.* 60 "),
        ({"prompt": (1,) * 60, "max_tokens": None, "min_tokens": 5}, "min_tokens: got 5"),
        ({"seed": None}, "seed: got None"),
        ({"adapter": 1}, "adapter: got 1"),
        (
            {"stop_token_ids": (49, 50)},
            "stop_token_ids: got 50, must be whole numbers from 0 to 49",
        ),
        ({"logit_bias": {50: 1.0}}, "logit_bias: got 50, must be whole numbers from 0 to 49"),
        ({"allowed_token_ids": (1, 50)}, "allowed_token_ids: got 50"),
        ({"bad_words": ((1, 50),)}, "bad_words: got 50"),
        (
            {"allowed_token_ids": (7, 8), "bad_words": ((8,), (7,))},
            "allowed_token_ids: got .*must be at least one token id that is not in bad_words",
        ),
        ({"bad_words": ("no",)}, "bad_words: got 'no', must be token ids by the time"),
        (
            {"stop_token_ids": tuple(range(16)), "eos_ids": (20,)},
            "stop_token_ids: got '17 ids.*at most 16",
        ),
    ],
)
def test_refusals_name_field_value_and_limit(changes: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_request(make_request(**changes), SPEC)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": (49,)},
        {"allowed_token_ids": (7, 8), "bad_words": ((7,), (8, 8))},
        {"prompt": (1,) * 63, "max_tokens": 1},
        {"prompt": (1,) * 63, "max_tokens": None},
        {"prompt": (1,) * 60, "max_tokens": 4},
        {"stop_token_ids": tuple(range(16)), "eos_ids": (3,)},
        {"stop_token_ids": tuple(range(16)), "eos_ids": (20,), "ignore_eos": True},
    ],
)
def test_the_last_that_fits_is_served(changes: dict) -> None:
    check_request(make_request(**changes), SPEC)


def test_few_pages_limit_the_context_and_the_refusal_says_so() -> None:
    spec = make_spec(pages=4, page_size=4, max_model_len=64)
    assert context_limit(spec)[0] == 13  # three pages, and the last token needs none
    check_request(make_request(prompt=(1,) * 10, max_tokens=3), spec)
    with pytest.raises(InvalidRequest, match=r"at most 3.*13 \(3 KV pages of 4 tokens\)"):
        check_request(make_request(prompt=(1,) * 10, max_tokens=4), spec)
    assert resolve_max_tokens(make_request(prompt=(1,) * 10, max_tokens=None), spec) == 3


def test_no_max_tokens_is_as_many_as_the_context_allows() -> None:
    assert resolve_max_tokens(make_request(prompt=(1,) * 10, max_tokens=None), SPEC) == 54
