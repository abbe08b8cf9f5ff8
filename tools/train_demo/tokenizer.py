"""The demo model's tokenizer: a byte-level BPE that never merges inside a word to be spelled.

Trained and saved by `__main__.py`, used by `data.py`. To reverse a word the model must see its
letters, and to add it must see digits. So digits stand alone, and a merge must grow from an anchor:
a leading space, a leading capital, or a closing newline (role names of the chat template). Words
inside a sentence become whole tokens in this way, while after ": " or an opening quote, where the
tasks put the text to work on, lowercase letters stay single. The result is an ordinary BPE that
every implementation encodes alike; only the choice of its merges is ours.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from .smalltalk import SYSTEM_PROMPTS, TOPICS
from .tasks import ADD_PHRASINGS, REPEAT_PHRASINGS, REVERSE_PHRASINGS

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

VOCAB_SIZE = 768

_ROLES = ("system", "user", "assistant")
_ROLE_COUNT = 1000  # the template's words occur in every conversation

_SPACE, _NEWLINE = "Ġ", "Ċ"  # how byte-level BPE writes these two bytes
_FIRST = frozenset([_SPACE, ":", *string.ascii_uppercase])

_PIECES = "|".join(
    (
        rf"(?:{'|'.join(_ROLES)})\n",
        r": ",  # keeps the space away from the word after it
        r" ?\p{Lu}?\p{Ll}+",
        r" ?\p{Lu}",  # capitals in a row (KV, JAX) one by one
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]",
        r"\s",
        r".",
    )
)


def build(vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """The tokenizer, with merges learned from the tasks' own text."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = _learn_merges(_corpus(), vocab_size - len(alphabet) - len(SPECIAL_TOKENS))
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _pre_tokenizer() -> Sequence:
    return Sequence(
        [
            Split(Regex(_PIECES), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _corpus() -> Counter[str]:
    """Text to learn merges from, with how often each piece of it counts."""
    texts: Counter[str] = Counter()
    texts.update(SYSTEM_PROMPTS)
    for topic in TOPICS:
        texts[topic.answer] += len(topic.questions)
        texts.update(topic.questions)
    for phrasing in (*ADD_PHRASINGS, *REPEAT_PHRASINGS, *REVERSE_PHRASINGS):
        texts[phrasing.format(a=0, b=0, text="0")] += 10
    for role in _ROLES:
        texts[f"{role}\n"] += _ROLE_COUNT
    return texts


def _anchored(left: str, right: str) -> bool:
    """Whether the pair may merge: it holds the anchor of its piece (module docstring)."""
    return left[0] in _FIRST or right[-1] == _NEWLINE


def _learn_merges(texts: Mapping[str, int], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv:1508.07909): merge the most frequent allowed pair, `count` times.

    Ties go to the pair that sorts first, so the result depends on the text alone.
    """
    pre = _pre_tokenizer()
    pieces: Counter[str] = Counter()
    for text, weight in texts.items():
        for piece, _ in pre.pre_tokenize_str(text):
            pieces[piece] += weight
    words = {piece: list(piece) for piece in pieces}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for piece, parts in words.items():
            for pair in pairwise(parts):
                if _anchored(*pair):
                    pairs[pair] += pieces[piece]
        if not pairs:
            raise ValueError(f"only {len(merges)} merges to be learned, {count} asked for")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in words.values():
            _merge(parts, best)
    return merges


def _merge(parts: list[str], pair: tuple[str, str]) -> None:
    """Joins every occurrence of `pair` in place."""
    i = 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == pair:
            parts[i : i + 2] = ["".join(pair)]
        i += 1
