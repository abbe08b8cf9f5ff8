"""TextAssembler against the plain statement of what it does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quire.checkpoints.detokenize import StreamDecoder
from quire.serving.text import TextAssembler


class Pieces(StreamDecoder):
    """Token i is the i-th piece of a text; the last piece comes with the flush."""

    def __init__(self, pieces: Sequence[str]):
        self._pieces = pieces

    def step(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return self._pieces[-1]


def first_stop(text: str, stops: Sequence[str], begin: int) -> tuple[int, str] | None:
    """Where and which: the first to be complete beyond `begin`, of several the longest."""
    for end in range(begin + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), longest
    return None


def undecided(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of a text that may become a stop string."""
    return max(
        (n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0
    )


def assembled(pieces: Sequence[str], stops: Sequence[str], min_tokens: int) -> str:
    """Runs an assembler, comparing it with the definition at every token; returns its text."""
    assembler = TextAssembler(Pieces(pieces), stops, min_tokens)
    text = shown = ""
    for count, piece in enumerate(pieces, start=1):
        is_last = count == len(pieces)
        tokens = count - is_last  # the flush is no token
        before, text = len(text), text + piece
        shown += assembler.finish() if is_last else assembler.push(count - 1)
        found = first_stop(text, stops, before) if tokens >= min_tokens else None
        if found is not None:
            assert (shown, assembler.stopped_by) == (text[: found[0]], found[1])
            return shown
        assert assembler.stopped_by is None
        held = 0 if is_last else undecided(text, stops)
        assert shown == text[: len(text) - held]
    return shown


few_letters = st.text("ab", max_size=4)


@settings(max_examples=1500, deadline=None)
@given(
    pieces=st.lists(few_letters, min_size=1, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=4),
    min_tokens=st.integers(0, 6),
)
@example(["a", "b", "a", "b", ""], ["abc", "b"], 0)
@example(["xab", "c", ""], ["abcd", "bc"], 0)
@example(["ab", ""], ["ab", "b"], 0)
@example(["aa", "aab", ""], ["aaab"], 0)
@example(["a", "b", "a"], ["ba"], 0)
def test_it_does_what_its_definition_says(
    pieces: list[str], stops: list[str], min_tokens: int
) -> None:
    assembled(pieces, stops, min_tokens)


@settings(max_examples=500, deadline=None)
@given(text=st.text("ab…", max_size=20), stops=st.lists(st.text("ab…", min_size=1), max_size=4),
       data=st.data())  # fmt: skip
def test_how_a_text_is_cut_into_tokens_does_not_change_the_answer(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = first_stop(text, stops, 0)
    assert assembled(pieces, stops, 0) == (text if found is None else text[: found[0]])


@pytest.mark.parametrize(
    ("pieces", "stops", "min_tokens", "text"),
    [
        (["one", " two"], [], 0, "one two"),
        (["one", ".", "two"], ["."], 0, "one"),
        (["one\n", "\ntwo"], ["\n\n"], 0, "one"),
        (["one<", "end", ">two"], ["<end>"], 0, "one"),
        (["one<", "end", " two"], ["<end>"], 0, "one<end two"),
        (["ab", "ab"], ["ab"], 2, "ab"),
        (["a", "b", "c"], ["ab"], 2, ""),
        (["ab", "c"], ["ab"], 3, "abc"),
    ],
)
def test_examples(pieces: list[str], stops: list[str], min_tokens: int, text: str) -> None:
    assert assembled([*pieces, ""], stops, min_tokens) == text


def test_the_stop_id_counts_but_has_no_text() -> None:
    assembler = TextAssembler(Pieces(["a", "b", ""]), ["b"], min_tokens=2)
    assert assembler.push(0) + assembler.push(1, silent=True) + assembler.finish() == "a"
    assert assembler.stopped_by is None
