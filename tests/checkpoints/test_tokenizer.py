"""The tokenizer against transformers' AutoTokenizer, and streams against whole decodes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from quire.checkpoints.detokenize import TokenTable
from quire.checkpoints.tokenizer import Tokenizer as TokenizerOf
from quire.checkpoints.tokenizer import load_tokenizer
from quire.errors import CheckpointError, InvalidRequest

KINDS = ["byte_level", "bos", "byte_fallback"]
BROKEN = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_ids_and_text_match_transformers(
    kind: str, add_bos: bool | None, name: str, write_tokenizer: Any, texts: tuple[str, ...]
) -> None:
    fields = {} if add_bos is None else {"add_bos_token": add_bos}
    folder = write_tokenizer(kind, bos_token="<s>", tokenizer_class=name, **fields)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special).input_ids
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    starts_with_bos = kind == "bos"
    assert (ours.encode("a")[0] == theirs.bos_token_id) is starts_with_bos


def test_special_tokens_are_strings_or_objects(write_tokenizer: Any) -> None:
    folder = write_tokenizer(
        bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", pad_token=None
    )
    assert load_tokenizer(folder).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_special_tokens_map_counts_where_no_tokens_are_declared(
    write_tokenizer: Any, edit_json: Any
) -> None:
    folder = write_tokenizer(bos_token="<s>", eos_token="</s>")
    edit_json(folder / "special_tokens_map.json", eos_token={"content": "<|im_end|>"})
    assert load_tokenizer(folder).special_tokens["eos_token"] == "<|im_end|>"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    declared = {"1": {"content": "</s>", "special": True}}
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=declared)
    assert load_tokenizer(folder).special_tokens["eos_token"] == "</s>"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def test_only_a_special_tokens_map(write_tokenizer: Any, edit_json: Any) -> None:
    folder = write_tokenizer()
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_id is None
    edit_json(folder / "special_tokens_map.json", eos_token="</s>")
    assert load_tokenizer(folder).eos_id == 1


def test_tokens_declared_beside_tokenizer_json(write_tokenizer: Any, backends: Any) -> None:
    new = backends["byte_level"].get_vocab_size()
    declared = {
        "0": {"content": "<s>", "special": True},
        "2": {"content": "<|im_start|>", "special": False},
        str(new): {"content": "<▁think▁>", "special": False},
        str(new + 1): {"content": "<secret>", "special": True},
    }
    folder = write_tokenizer(added_tokens_decoder=declared)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>a<▁think▁>b<secret>c"
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids and new in ids and ours.vocab_size == new + 2
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == "a<▁think▁>bc"  # once special, the library keeps a token so
    stream = ours.stream_decoder()
    assert stream.push(ids) + stream.flush() == ours.decode(ids)


def test_declared_id_that_cannot_be_is_refused(write_tokenizer: Any) -> None:
    folder = write_tokenizer(added_tokens_decoder={"9999": {"content": "<new>"}})
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder: '<new>': got id 9999, must"):
        load_tokenizer(folder)
    folder = write_tokenizer(added_tokens_decoder=["<new>"])
    with pytest.raises(CheckpointError, match="added_tokens_decoder: must be an object"):
        load_tokenizer(folder)


def test_named_token_becomes_special(tmp_path: Path, edit_json: Any) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "e": 1, "<": 2}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    edit_json(tmp_path / "tokenizer_config.json", eos_token="e", bos_token="<absent>")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("aea") == theirs("aea").input_ids == [0, 1, 0]
    assert ours.decode([0, 1, 0]) == theirs.decode([0, 1, 0], skip_special_tokens=True) == "aa"
    assert ours.token_to_id("<absent>") is None and ours.vocab_size == 3


def test_never_truncates_nor_pads(tmp_path: Path, backends: Any) -> None:
    backend = Tokenizer.from_str(backends["byte_level"].to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    for text in ("Hello", "Hello world, how are you? " * 9):
        assert load_tokenizer(tmp_path).encode(text) == backends["byte_level"].encode(text).ids


def test_split_special_tokens(write_tokenizer: Any) -> None:
    folder = write_tokenizer(split_special_tokens=True)
    ids = load_tokenizer(folder).encode("<s>")
    assert 0 not in ids and ids == AutoTokenizer.from_pretrained(folder)("<s>").input_ids


def test_a_long_text_gives_the_ids_that_the_library_gives(write_tokenizer: Any) -> None:
    """It goes another way, on which other threads get on."""
    text = "h\u00e9llo w\u00f6rld \U0001f600, " * 400
    for kind in KINDS:
        folder = write_tokenizer(kind)
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for special in (True, False):
            ids = load_tokenizer(folder).encode(text, special)
            assert len(text) > 4096 and ids == backend.encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize("kind", KINDS)
def test_many_ids_give_the_text_that_the_library_gives(kind: str, write_tokenizer: Any) -> None:
    """They go another way, too."""
    folder = write_tokenizer(kind)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    single = backend.encode("<s> h\u00e9llo w\u00f6rld \U0001f600, ").ids
    ids = single * (1 + 4096 // len(single))
    for skip in (True, False):
        text = load_tokenizer(folder).decode(ids, skip)
        assert BROKEN not in text and text == backend.decode(ids, skip_special_tokens=skip)


class Counting:
    """A library's tokenizer that counts the characters it is given."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend, self.characters = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, text: str, **how: Any) -> Any:
        self.characters += len(text)
        return self._backend.encode(text, **how)

    def encode_batch_fast(self, texts: list[str], **how: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self._backend.encode_batch_fast(texts, **how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a quick fox ", "aaaa", "    ", "\n", "你好", "12345", "\u0301"])
def test_a_text_that_is_much_too_long_is_known_early(
    kind: str, text: str, write_tokenizer: Any
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(kind))
    backend = tokenizer._backend = Counting(tokenizer._backend)  # type: ignore[assignment]
    most = 100
    assert tokenizer.exceeds(text * 50_000 + "end", most)
    assert backend.characters <= 50 * most


def test_a_long_word_at_its_head_hides_no_long_text() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TokenizerOf(backend, {})
    assert tokenizer.exceeds("x" * 2000 + " a" * 50_000, 100)
    assert not tokenizer.exceeds("x" * 50_000, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_called_too_long_that_is_not(kind: str, write_tokenizer: Any) -> None:
    backend = load_tokenizer(write_tokenizer(kind))._backend
    backend.add_tokens([AddedToken("<gulp>", lstrip=True, rstrip=True)])
    tokenizer = TokenizerOf(backend, {})
    draw = random.Random(0)
    pieces = ["a", " ", "quick", "<gulp>", " " * 300, "x" * 300, "\n", "好", "12", "<s>"]
    found = 0
    for _ in range(300):
        text = "".join(draw.choices(pieces, k=draw.randrange(60)))
        length = len(tokenizer.encode(text, add_special_tokens=False))
        for most in (1, 4, 16, 64):
            exceeds = tokenizer.exceeds(text, most)
            assert not exceeds or length > most
            found += exceeds
    assert found > 20
    for text in (" " * 5000 + "<gulp>", "<gulp>" + " " * 5000 + "<gulp>"):
        assert len(tokenizer.encode(text, add_special_tokens=False)) <= 3
        assert not tokenizer.exceeds(text, 3)


@pytest.mark.parametrize("before", ["", "long " * 1000])
def test_lone_surrogate_is_the_callers_fault(write_tokenizer: Any, before: str) -> None:
    with pytest.raises(InvalidRequest, match=r"text: got .*, must be text without lone sur"):
        load_tokenizer(write_tokenizer()).encode(before + "\ud800")


def test_ids_without_a_token(write_tokenizer: Any) -> None:
    for kind in KINDS:
        tokenizer = load_tokenizer(write_tokenizer(kind))
        assert tokenizer.id_to_token(10**6) is None
        assert tokenizer.decode([10**6]) == ""
        assert tokenizer.stream_decoder().step(10**6) == ""
        assert tokenizer.token_to_id("</s>") == tokenizer.eos_id


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"has no tokenizer\.json$"),
        (["tokenizer.model"], r"has tokenizer\.model but no tokenizer\.json.*AutoTokenizer"),
        (["tekken.json"], r"has tekken\.json but no tokenizer\.json"),
    ],
)
def test_no_tokenizer(files: list[str], message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("")
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer that can be read"):
        load_tokenizer(tmp_path)


# Streams.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_stream_of_real_text(
    kind: str, skip: bool, write_tokenizer: Any, texts: tuple[str, ...]
) -> None:
    tokenizer = load_tokenizer(write_tokenizer(kind))
    for text in (*texts, "".join(texts)):
        ids = tokenizer.encode(text)
        stream = tokenizer.stream_decoder(skip)
        pieces = [stream.step(i) for i in ids] + [stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids, skip)
        if BROKEN not in text:
            assert BROKEN not in "".join(pieces)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_stream_of_random_ids(kind: str, skip: bool, write_tokenizer: Any, backends: Any) -> None:
    tokenizer, rng = load_tokenizer(write_tokenizer(kind)), random.Random(0)
    well_formed = 0
    for _ in range(1500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 14))]
        stream = tokenizer.stream_decoder(skip)
        text = stream.push(ids) + stream.flush()
        assert text == tokenizer.decode(ids, skip), ids
        library = backends[kind].decode(ids, skip_special_tokens=skip)
        if kind != "byte_fallback" or BROKEN not in library:
            assert text == library, ids
            well_formed += 1
    assert well_formed > 50


def test_characters_come_out_whole_and_at_once(write_tokenizer: Any) -> None:
    for kind in KINDS:
        tokenizer = load_tokenizer(write_tokenizer(kind))
        data = "😀ह".encode()
        if kind == "byte_fallback":
            ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
        else:
            table = TokenTable(tokenizer._backend, frozenset())
            single = {table.bytes_of(i): i for i in range(tokenizer.vocab_size)}
            ids = [single[bytes([byte])] for byte in data]
        stream = tokenizer.stream_decoder()
        assert [stream.step(i) for i in ids] == ["", "", "", "😀", "", "", "ह"]  # type: ignore[arg-type]
        assert stream.flush() == ""


def test_broken_bytes_spoil_nothing_else(write_tokenizer: Any) -> None:
    tokenizer = load_tokenizer(write_tokenizer("byte_fallback"))
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") or 0 for byte in "你".encode() + b"\xe5"]
    world = tokenizer.token_to_id("▁world") or 0
    assert tokenizer.decode(ids) == f"你{BROKEN}"
    stream = tokenizer.stream_decoder()
    assert [stream.step(i) for i in [*ids, world]][2:] == ["你", "", f"{BROKEN} world"]


def test_first_blank_is_stripped_once(write_tokenizer: Any) -> None:
    tokenizer = load_tokenizer(write_tokenizer("byte_fallback"))
    blank, hello, bos, byte = (
        tokenizer.token_to_id(t) or 0 for t in ("▁", "▁Hello", "<s>", "<0x20>")
    )
    for ids in (
        [hello, hello],
        [bos, hello, bos, hello],
        [blank, blank, hello],
        [byte, byte, hello],
    ):
        for skip in (True, False):
            stream = tokenizer.stream_decoder(skip)
            assert stream.push(ids) + stream.flush() == tokenizer.decode(ids, skip)
            assert tokenizer.decode(ids, skip) == tokenizer._backend.decode(ids, skip)


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.Metaspace(prepend_scheme="always"),
        decoders.WordPiece(prefix="##"),
        decoders.BPEDecoder(suffix="</w>"),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "y")]),
    ],
    ids=["none", "metaspace", "wordpiece", "bpe", "sequence"],
)
def test_other_decoders(decoder: Any) -> None:
    words = ["▁a", "b", "##c", "d</w>", "Ġx", "â", "Ĥ", "¬", "ðŁ", "ĺĢ", "<s>"]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    table, rng = TokenTable(backend, frozenset({10})), random.Random(1)
    for text_ids in ([0, 1, 4], [5, 6, 7, 4], [4, 8, 9, 1], [10, 0, 10, 1]):
        stream = table.stream(skip_special_tokens=True)
        assert stream.push(text_ids) + stream.flush() == backend.decode(text_ids)
    for _ in range(200):
        ids = [rng.randrange(5) for _ in range(6)]
        stream = table.stream(skip_special_tokens=True)
        assert stream.push(ids) + stream.flush() == backend.decode(ids)


def test_little_is_held_back_for_a_character_that_never_ends() -> None:
    backend = Tokenizer(models.BPE(vocab={"ðŁ": 0}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "y")])
    stream = TokenTable(backend, frozenset()).stream(skip_special_tokens=True)
    assert len(stream.push([0] * 50)) >= 40


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["text", "broken"])
def test_cost_per_token_does_not_grow(kind: str, what: str, write_tokenizer: Any) -> None:
    tokenizer = load_tokenizer(write_tokenizer(kind))
    token = {"byte_level": "Ł", "bos": "Ł", "byte_fallback": "<0xF0>"}[kind]
    one = tokenizer.token_to_id(token) if what == "broken" else tokenizer.encode("a")[-1]
    assert one is not None
    if what == "broken":
        assert tokenizer.decode([one]) == BROKEN

    def seconds(tokens: int) -> float:
        stream = tokenizer.stream_decoder()
        start = time.thread_time()  # others on this machine take theirs
        stream.push([one] * tokens)
        return time.thread_time() - start

    seconds(1000)
    short = min(seconds(2000) for _ in range(3))
    assert min(seconds(16000) for _ in range(3)) < 8 * 4 * short
