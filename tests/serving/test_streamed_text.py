"""The text of a stream, joined, is that of the whole answer, byte for byte: for prompts in many
scripts, tokenizers of every kind, and however tokens and messages are cut."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multilingual import MAKERS, PROMPTS, tokenizer
from running import Running
from test_text import first_stop, undecided

from quire import SamplingParams
from quire.checkpoints.tokenizer import Tokenizer
from quire.protos.v1 import generation_pb2 as pb
from quire.sched.request import FinishReason, RequestOutput
from quire.serving.answer import Answer
from quire.serving.frontend.pending import Pending

BROKEN = "\N{REPLACEMENT CHARACTER}"

kinds = pytest.mark.parametrize("kind", MAKERS)


def outputs(ids: Sequence[int], cuts: Sequence[int]) -> list[RequestOutput]:
    """The engine's outputs of an answer, cut before these places; the last says that it ended."""
    edges = sorted({0, *(cut for cut in cuts if cut < len(ids)), len(ids)})
    parts = [RequestOutput("r", tuple(ids[a:b])) for a, b in itertools.pairwise(edges)]
    parts = parts or [RequestOutput("r")]
    parts[-1].finish_reason = FinishReason.LENGTH
    return parts


def streamed(
    tokens: Tokenizer, ids: Sequence[int], cuts: Sequence[int], stop: Sequence[str], skip: bool
) -> tuple[list[str], list[int], str | int | None]:
    """Texts, token ids and stop reason of an answer's chunks."""
    sampling = SamplingParams(stop=tuple(stop), skip_special_tokens=skip)
    answer = Answer(sampling, tokens.stream_decoder(skip), str)
    chunks = [chunk for part in outputs(ids, cuts) if (chunk := answer.push(part)) is not None]
    return (
        [chunk.text for chunk in chunks],
        [token for chunk in chunks for token in chunk.token_ids],
        chunks[-1].stop_reason,
    )


@kinds
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_prompt_at_every_regular_chunking(kind: str, prompt: str) -> None:
    tokens = tokenizer(kind)
    for ids in (tokens.encode(prompt), tokens.encode(f"a {prompt}")[1:], [1, 0]):
        for skip in (True, False):
            whole = tokens.decode(ids, skip)
            for size in (1, 2, 3, 7, len(ids) + 1):
                texts, given_ids, _ = streamed(tokens, ids, range(0, len(ids), size), (), skip)
                assert ("".join(texts), given_ids) == (whole, list(ids))
    if kind.startswith("byte-level") and "nfc" not in kind and "prefix" not in kind:
        assert tokens.decode(tokens.encode(prompt)) == prompt  # so the text is worth comparing


@kinds
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_at_any_chunking_with_any_stops(kind: str, data: st.DataObject) -> None:
    """Tokens that a model may as well emit in any order, so characters break anywhere."""
    tokens = tokenizer(kind)
    top = tokens.vocab_size
    spelled = [tokens.token_to_id(f"<0x{byte:02X}>") for byte in b" \xe4\xbd\xf0\n"]
    awkward = st.sampled_from([i for i in spelled if i is not None] + list(range(top - 12, top)))
    pieces = data.draw(
        st.lists(
            st.one_of(
                st.sampled_from(PROMPTS).map(tokens.encode),
                st.lists(st.one_of(awkward, st.integers(0, top + 3)), max_size=6),
            ),
            max_size=4,
        )
    )
    ids = list(itertools.chain(*pieces))[:60]
    skip = data.draw(st.booleans())
    whole = tokens.decode(ids, skip)
    found_in_it = st.builds(
        lambda a, n: whole[a : a + n], st.integers(0, len(whole)), st.integers(1, 9)
    )
    stops = data.draw(st.lists(st.one_of(found_in_it, st.text(max_size=3)), max_size=3))
    stops = [stop for stop in stops if stop]
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))

    texts, used, reason = streamed(tokens, ids, cuts, stops, skip)
    end = first_stop(whole, stops, 0)
    expected = (whole, None) if end is None else (whole[: end[0]], end[1])
    assert ("".join(texts), reason) == expected
    assert used == ids[: len(used)] and (end is not None or used == ids)
    by_one = streamed(tokens, ids, range(len(ids)), stops, skip)
    at_once = streamed(tokens, ids, (), stops, skip)
    assert ("".join(by_one[0]), *by_one[1:]) == ("".join(at_once[0]), *at_once[1:])
    assert ("".join(texts), used, reason) == ("".join(by_one[0]), *by_one[1:])
    if end is not None:
        # No token more than the stop string needs.
        before = tokens.stream_decoder(skip).push(used[:-1])
        assert len(before) < end[0] + len(end[1])


@kinds
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_is_held_back_only_while_it_may_change(kind: str, data: st.DataObject) -> None:
    """What is out is never taken back; what is held is a character that is not complete, or what
    may become a stop string."""
    tokens = tokenizer(kind)
    ids = list(itertools.chain(*map(tokens.encode, data.draw(
        st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=2)))))[:60]  # fmt: skip
    whole = tokens.decode(ids)
    at = data.draw(st.integers(0, len(whole)))
    stop = whole[at : at + data.draw(st.integers(1, 5))] + data.draw(st.sampled_from(["", "♫"]))
    stops = [stop] if stop else []
    sampling = SamplingParams(stop=tuple(stops))
    answer = Answer(sampling, tokens.stream_decoder(), str)
    shown = ""
    for count in range(1, len(ids) + 1):
        chunk = answer.push(RequestOutput("r", (ids[count - 1],)))
        assert chunk is not None
        shown += chunk.text
        if answer.finished:
            break
        assert whole.startswith(shown)
        certain = tokens.decode(ids[:count]).rstrip(BROKEN)
        if not certain.endswith(" "):  # which some decoders strip only at the end
            assert len(shown) >= len(certain) - undecided(certain, stops)
    else:
        return
    assert stops and shown == whole[: whole.index(stop)]
    assert stop not in shown


@pytest.mark.parametrize("kind", ["byte-level-across-words", "byte-fallback-strip"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_however_slow_the_reader(kind: str, data: st.DataObject) -> None:
    """What a reader missed comes to it as one; the text is the same, also where a stop string lies
    across what it missed."""
    tokens = tokenizer(kind)
    ids = tokens.encode(data.draw(st.sampled_from(PROMPTS)))
    places = st.lists(st.integers(0, len(ids)), max_size=len(ids))
    parts = outputs(ids, data.draw(places))
    whole = tokens.decode(ids)
    at = data.draw(st.integers(0, len(whole)))
    stops = [stop for stop in [whole[at : at + 3]] if stop and data.draw(st.booleans())]
    reads = {*data.draw(places), len(parts) - 1}

    async def read() -> tuple[str, str | int | None]:
        sampling = SamplingParams(stop=tuple(stops))
        answer = Answer(sampling, tokens.stream_decoder(), str)
        pending, text, reason = Pending("r"), "", None
        for index, part in enumerate(parts):
            if part.finish_reason is None and data.draw(st.booleans()):
                pending.put_tokens(part.tokens)
            else:
                pending.put(part)
            for output in await pending.take() if index in reads else ():
                chunk = answer.push(output)
                if chunk is not None:
                    text, reason = text + chunk.text, chunk.stop_reason
        assert answer.finished
        return text, reason

    end = first_stop(whole, stops, 0)
    expected = (whole, None) if end is None else (whole[: end[0]], end[1])
    assert asyncio.run(read()) == expected


@pytest.mark.parametrize("at", range(0, len(PROMPTS), 3))
def test_over_the_wire_the_stream_is_the_unary_answer(served: Running, at: int) -> None:
    """So hot that answers are random bytes: half of the text is broken characters."""
    for index, prompt in enumerate(PROMPTS[at : at + 3], start=at):
        fields = {"temperature": 100.0, "seed": index, "max_tokens": 32, "ignore_eos": True}

        def both(prompt: str = prompt, **sampling: Any) -> pb.GenerateResponse:
            request = pb.GenerateRequest(text=prompt, sampling=pb.SamplingParams(**sampling))
            whole = served.stub.Generate(request, timeout=60)
            chunks = list(served.stub.StreamGenerate(request, timeout=60))
            assert "".join(chunk.text for chunk in chunks).encode() == whole.text.encode()
            assert [t for chunk in chunks for t in chunk.token_ids] == list(whole.token_ids)
            assert chunks[-1].finish_reason == whole.finish_reason
            return whole

        whole = both(**fields)
        back = pb.DetokenizeRequest(token_ids=whole.token_ids)
        assert served.stub.Detokenize(back, timeout=60).text == whole.text
        assert len(whole.text) > 8
        stop = whole.text[6:8]
        stopped = both(stop=[stop], **fields)
        assert stopped.text == whole.text[: whole.text.index(stop)]
        assert stopped.stop_reason.stop == stop
