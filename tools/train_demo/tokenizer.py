"""The demo models' tokenizer: a byte-level BPE that keeps the letters of a word to be worked on.

Trained and saved by `__main__.py`, used by `data.py`. To reverse a word the model must see its
letters, and to add it must see digits. So digits stand alone, and lowercase letters are merged only
behind a space or a capital, or in the strings of JSON: behind ": ", an opening quote or a newline,
where the tasks put the text to work on and where their answers begin, they stay single. That is all
in the pattern which cuts text into pieces; the merges within pieces are learned as always, from
samples of the tasks. The result is an ordinary tokenizer.json.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from ..tasks.registry import TASKS, draw
from .chat import CALL, CALL_END, RESULT, RESULT_END, THINK, THINK_END, pieces
from .chat import END_OF_TEXT as END_OF_TEXT
from .chat import TURN_END as TURN_END
from .chat import TURN_START as TURN_START

SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
MARKS = (THINK, THINK_END, CALL, CALL_END, RESULT, RESULT_END)
"""Single tokens too, but part of the text, as of Qwen3: parsers look for them."""

VOCAB_SIZE = 2048

_SAMPLE_CHARACTERS = 2_000_000

_PIECES = "|".join(
    (
        r"(?:system|user|assistant)\n",
        r'(?<=[{\[]"|, "|": ")[a-z_]+',  # a name or a string of JSON
        r"'(?:s|m|t|re|ve|ll|d)(?!\p{L})",
        r": (?=\p{Ll})",  # keeps the space away from the word after it
        r" \p{Lu}?\p{Ll}+",
        r"\p{Lu}\p{Ll}+",
        r" ?\p{Lu}",  # capitals in a row one by one
        r"\p{L}",
        r"\p{N}",
        # Signs in a row, also those between names of JSON; with the space before a digit.
        r' ?[^\s\p{L}\p{N}]+(?: (?:["\[{]+|(?=\p{N})))?',
        r"\s",
        r".",
    )
)


def build(vocab_size: int = VOCAB_SIZE, seed: int = 0) -> Tokenizer:
    """The tokenizer, with merges learned from the tasks' own text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [
            Split(Regex(_PIECES), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(MARKS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(random.Random(seed)), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"only {tokenizer.get_vocab_size()} entries learned, not {vocab_size}")
    return tokenizer


def _corpus(rng: random.Random) -> Iterator[str]:
    """Samples of every task, in the proportions that it is trained on."""
    between = re.compile("|".join(map(re.escape, (*SPECIAL_TOKENS, *MARKS))))
    for task in TASKS.values():
        characters = 0
        while characters < task.share * _SAMPLE_CHARACTERS:
            example = draw(task, rng, "train")
            text = "".join([piece.text for piece in pieces(example.messages, example.tools)])
            characters += len(text)
            yield from filter(None, between.split(text))
