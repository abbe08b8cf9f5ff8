"""A checkpoint's tokenizer: text <-> token ids. Made by folder.py, used by serving/.

tokenizer.json is the whole truth about how text becomes ids, whether a beginning-of-sequence token
is added included: transformers 5 reads it the same way and ignores `add_bos_token` beside it.
tokenizer_config.json says which tokens are special, and may add some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ..errors import CheckpointError, invalid
from .detokenize import StreamDecoder, TokenTable
from .json_fields import read_json, read_json_if_there

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_LONG = 4096
"""Characters or tokens from which on a text is encoded or decoded as a batch of one: alone it would
hold the interpreter, for as much as a second a megabyte; a batch lets others go on."""

_LONG_TOKEN = 12
"""Characters that a text's tokens hardly ever have on average."""


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; safe to share between threads."""

    def __init__(self, backend: Backend, special_tokens: Mapping[str, str]) -> None:
        """
        Args:
          backend: from tokenizer.json, never truncating.
          special_tokens: name (such as "bos_token") -> the token.
        """
        self._backend = backend
        self.special_tokens = dict(special_tokens)
        self.special_ids = _special_ids(backend)
        self._table = TokenTable(backend, self.special_ids)
        added = backend.get_added_tokens_decoder().values()
        self._swallows_spaces = any(token.lstrip for token in added)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return 1 + max(self.vocab.values(), default=-1)

    @property
    def vocab(self) -> dict[str, int]:
        """Every token as the vocabulary spells it, with its id."""
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    @property
    def eos_id(self) -> int | None:
        token = self.special_tokens.get("eos_token")
        return None if token is None else self.token_to_id(token)

    def encode(
        self, text: str, add_special_tokens: bool = True, *, field: str = "text"
    ) -> list[int]:
        """The ids of `text`; with the tokens around it that tokenizer.json asks for, if wanted.

        Raises:
          InvalidRequest: it is no text that UTF-8 can spell; the message begins with `field`.
        """
        try:
            if len(text) < _LONG:
                return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(batch[0].ids)
        except (UnicodeEncodeError, TypeError) as error:
            # A lone surrogate, which JSON can spell and UTF-8 cannot.
            limit = "text without lone surrogates, which UTF-8 cannot spell"
            raise invalid(field, text, limit) from error

    def exceeds(self, text: str, most: int, *, field: str = "text") -> bool:
        """Whether a text surely has more than `most` tokens, found without encoding much more than
        so many: a second and a few hundred MB for each megabyte are too much to find a text too
        long. False says nothing.

        What follows a text's head can change the tokens of the head's last word alone, for which
        half of them are given away, and those of spaces at its end, where there are added tokens
        that swallow them.

        Raises:
          InvalidRequest: as `encode`.
        """
        size = most * _LONG_TOKEN
        while size < len(text):
            head = text[:size].rstrip() if self._swallows_spaces else text[:size]
            if len(self.encode(head, False, field=field)) > 2 * most:
                return True
            size *= 4
        return False

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; ids without a token give nothing."""
        text: str
        if len(token_ids) < _LONG:
            text = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        else:
            batch = [list(token_ids)]
            (text,) = self._backend.decode_batch(batch, skip_special_tokens=skip_special_tokens)
        if "\N{REPLACEMENT CHARACTER}" in text and not self._table.is_byte_level:
            # For broken bytes streams go their own way (detokenize.py); both must agree.
            stream = self.stream_decoder(skip_special_tokens)
            text = stream.push(token_ids) + stream.flush()
        return text

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """Decodes a sequence as it grows; one per sequence."""
        return self._table.stream(skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found


def _special_ids(backend: Backend) -> frozenset[int]:
    """The tokens that the library leaves out. Its own flags do not tell: a token that was special
    and was declared anew as ordinary is left out all the same."""
    added = backend.get_added_tokens_decoder()
    return frozenset(
        i for i in added if backend.decode([i], False) and not backend.decode([i], True)
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(_no_tokenizer(folder))
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file}: not a tokenizer that can be read: {error}") from error
    # A file may carry what its training script had set; prompts are never cut.
    backend.no_truncation()
    backend.no_padding()
    config_file = folder / "tokenizer_config.json"
    config = read_json_if_there(config_file)
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add_tokens(backend, config_file, config)
    special = read_special_tokens(folder)
    _mark_special(backend, special)
    return Tokenizer(backend, special)


def _no_tokenizer(folder: Path) -> str:
    older = [name for name in ("tokenizer.model", "tekken.json", "vocab.json") if _is(folder, name)]
    if not older:
        return f"{folder}: has no tokenizer.json"
    return (
        f"{folder}: has {older[0]} but no tokenizer.json, which Quire needs; to make one: "
        'python -c "from transformers import AutoTokenizer as T; '
        "T.from_pretrained('IN').save_pretrained('OUT')\""
    )


def _is(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _add_tokens(backend: Backend, file: Path, config: Mapping[str, Any]) -> None:
    """Adds the tokens that only tokenizer_config.json knows, under the ids it gives them."""
    declared = config.get("added_tokens_decoder") or {}
    try:
        tokens = {int(i): AddedToken(**token) for i, token in declared.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: added_tokens_decoder: must be an object of id: token: {error}"
        ) from error
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(tokens.items()):
        if repr(known.get(token.content)) != repr(token):
            # New, or the same token with other flags, which then count.
            backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise CheckpointError(
                f"{file}: added_tokens_decoder: {token.content!r}: got id {token_id}, must be "
                f"{found} to follow tokenizer.json"
            )


def read_special_tokens(folder: Path) -> dict[str, str]:
    """Name -> token, without reading the vocabulary.

    special_tokens_map.json is the older file: it counts where tokenizer_config.json declares no
    tokens, as in transformers.
    """
    config = read_json_if_there(folder / "tokenizer_config.json")
    merged = dict(config)
    map_file = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and map_file.is_file():
        merged |= read_json(map_file)
    found = {name: _content(merged.get(name)) for name in NAMED_TOKENS}
    return {name: token for name, token in found.items() if token is not None}


def _content(value: Any) -> str | None:
    """A token is spelled as a string or as {"content": ...}."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _mark_special(backend: Backend, special: Mapping[str, str]) -> None:
    """Makes the named tokens special where tokenizer.json has them as ordinary ones.

    A named token that is not in the vocabulary at all gets no id: a made-up one would lie beyond
    the embedding table.
    """
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in special.values():
        if token not in added and backend.token_to_id(token) is not None:
            backend.add_special_tokens([AddedToken(token, special=True)])
