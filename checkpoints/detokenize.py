"""Token ids -> text, one token at a time. Made by tokenizer.py, driven by serving/.

The pieces of a stream join to what `Tokenizer.decode` gives for all ids at once, each token costs
O(1), and a character split over tokens comes out whole. `tokenizers.decoders.DecodeStream` was
tried first: a run of broken bytes makes each of its steps as long as the run, a byte-fallback
vocabulary makes it raise in the middle of a stream, and it has no flush.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

_BROKEN = "\N{REPLACEMENT CHARACTER}"

_MAX_HELD = 8
"""Tokens held back at most for a character to complete; UTF-8 has no longer one than 4 bytes."""


class StreamDecoder(ABC):
    """The text of one growing sequence of tokens."""

    @abstractmethod
    def step(self, token_id: int) -> str:
        """Takes the next token; gives the text that is now certain, which may be empty."""

    @abstractmethod
    def flush(self) -> str:
        """Gives what is still held back; call once, at the end."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes several tokens."""
        return "".join([self.step(token_id) for token_id in token_ids])


class TokenTable:
    """What a vocabulary's tokens stand for, shared by all streams over it; filled as it is used."""

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        self.backend = backend
        self.special_ids = special_ids
        kinds = _decoder_kinds(backend)
        self.is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_fallback = "ByteFallback" in kinds
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}
        self._fallback: dict[int, bytes | None] = {}

    def stream(self, skip_special_tokens: bool) -> StreamDecoder:
        skip = self.special_ids if skip_special_tokens else frozenset[int]()
        return _ByteStream(self, skip) if self.is_byte_level else _TextStream(self, skip)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a byte-level token; none for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            known = _byte_level_bytes(self.backend.id_to_token(token_id) or "")
            self._bytes[token_id] = known
        return known

    def fallback_byte(self, token_id: int) -> bytes | None:
        """The byte that a token such as <0xE4> stands for; None for any other token."""
        if not self._has_byte_fallback:
            return None
        if token_id not in self._fallback:
            match = re.fullmatch("<0x([0-9A-F]{2})>", self.backend.id_to_token(token_id) or "")
            self._fallback[token_id] = bytes([int(match[1], 16)]) if match else None
        return self._fallback[token_id]

    def text_of(self, token_id: int) -> str:
        """The text of a sequence of this one token."""
        known = self._texts.get(token_id)
        if known is None:
            known = self._texts[token_id] = self.decode([token_id])
        return known

    def decode(self, token_ids: list[int]) -> str:
        return self.backend.decode(token_ids, skip_special_tokens=False)


class _ByteStream(StreamDecoder):
    """Byte-level vocabularies (Llama 3, Qwen): tokens are bytes, the text is their UTF-8."""

    def __init__(self, table: TokenTable, skip: frozenset[int]) -> None:
        self._table = table
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token_id: int) -> str:
        if token_id in self._skip:
            return ""
        return self._utf8.decode(self._table.bytes_of(token_id))

    def push(self, token_ids: Iterable[int]) -> str:
        bytes_of, skip = self._table.bytes_of, self._skip
        return self._utf8.decode(b"".join([bytes_of(i) for i in token_ids if i not in skip]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _TextStream(StreamDecoder):
    """Any other vocabulary (Llama 2, Mistral): a token's text depends on the token before it.

    Byte-fallback tokens are decoded here rather than by the library, which spoils a whole run of
    them, good characters included, for one broken byte at its end.
    """

    def __init__(self, table: TokenTable, skip: frozenset[int]) -> None:
        self._table = table
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: int | None = None  # the last token whose text is out
        self._held: list[int] = []  # tokens whose text may still change

    def step(self, token_id: int) -> str:
        table = self._table
        if token_id in self._skip or table.backend.id_to_token(token_id) is None:
            return ""
        byte = table.fallback_byte(token_id)
        if byte is not None:
            return self._step_byte(token_id, byte)
        broken = self._utf8.decode(b"", final=True)
        self._held.append(token_id)
        text = self._held_text()
        if text.endswith(_BROKEN) and len(self._held) < _MAX_HELD:
            return broken
        self._release()
        return broken + text

    def flush(self) -> str:
        text = self._held_text() if self._held else ""
        self._release()
        return text + self._utf8.decode(b"", final=True)

    def _step_byte(self, token_id: int, byte: bytes) -> str:
        text = self._held_text() if self._held else ""
        self._release()
        is_first, self._before = self._before is None, token_id
        if is_first and byte == b" ":
            # Decoders strip the blank at the very start, however it is spelled.
            return text + self._table.text_of(token_id)
        return text + self._utf8.decode(byte)

    def _held_text(self) -> str:
        if self._before is None:
            return self._table.decode(self._held)
        before = self._table.text_of(self._before)
        both = self._table.decode([self._before, *self._held])
        return both[len(before) :] if both.startswith(before) else self._table.decode(self._held)

    def _release(self) -> None:
        if self._held:
            self._before = self._held[-1]
            self._held = []


def _decoder_kinds(backend: Backend) -> list[str]:
    """The names of the tokenizer's decoders, in order."""
    if backend.decoder is None:
        return []
    if isinstance(backend.decoder, decoders.ByteLevel):
        return ["ByteLevel"]
    state = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[letter] for letter in token)
    except KeyError:
        # An added token, which stands for itself.
        return token.encode()
