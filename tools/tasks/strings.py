"""Copying, spelling, reversing, editing texts, and picking out their letters.

Most texts stand after a colon or in quotes, where the tokenizer leaves letters single.
"""

from __future__ import annotations

import random
import string

from .example import Example, asked, wordings
from .words import NOUNS, any_word, pseudo_word

MAX_COPIED_CHARS = 48
SPELLED_LETTERS = (2, 12)
REVERSED_LETTERS = (2, 12)
EDITED_LETTERS = (3, 10)

_BARE_SHARE = 0.06
"""Of words that stand without quotes, so that the model must know how their tokens are spelled."""

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")

_COPY = (
    "Repeat: {text}",
    "Repeat after me: {text}",
    "Say: {text}",
    "Copy: {text}",
    'Repeat "{text}".',
    'Say "{text}".',
    "Repeat this text: {text}",
    "Write this again: {text}",
    "repeat: {text}",
    "say: {text}",
)
_REVERSE = wordings(
    "Reverse: {text}",
    "Spell backwards: {text}",
    'Reverse "{text}".',
    'Reverse the word "{text}".',
    'What is "{text}" backwards?',
    'Write "{text}" backwards.',
    'Spell "{text}" backwards.',
)
_SPELL = wordings(
    "Spell: {text}",
    'Spell "{text}".',
    'Spell the word "{text}".',
    'How do you spell "{text}"?',
    'How is "{text}" spelled?',
)
_SPELL_BARE = wordings("Spell {text}.", "How do you spell {text}?", "How is {text} spelled?")
_REVERSE_BARE = wordings(
    "Reverse {text}.",
    "Reverse the word {text}.",
    "What is {text} backwards?",
    "Spell {text} backwards.",
)
_LETTER_BARE = wordings(
    "What is the {which} letter of {text}?", "Tell me the {which} letter of {text}."
)
_SPELL_APART = wordings(
    'Spell "{text}" with spaces.',
    'Spell "{text}" with spaces between the letters.',
    "Spell with spaces: {text}",
    'Put spaces between the letters of "{text}".',
)
_SPELL_CAPITALS = wordings(
    'Spell "{text}" in capitals.',
    'Spell "{text}" in capital letters.',
    "Spell in capitals: {text}",
)
_UNSPELL = wordings(
    "Which word is {text}?", "What word is {text}?", "What does {text} spell?", "Join: {text}"
)
_LETTER = wordings(
    'What is the {which} letter of "{text}"?',
    'Which letter is the {which} one in "{text}"?',
    'Tell me the {which} letter of "{text}".',
    'The {which} letter of "{text}"?',
)
_EDITS = {
    "replace": wordings(
        'Replace every "{x}" with "{y}" in "{text}".',
        'Replace "{x}" by "{y}" in "{text}".',
        'Change each "{x}" to "{y}" in "{text}".',
    ),
    "remove": wordings(
        'Remove every "{x}" from "{text}".',
        'Delete each "{x}" in "{text}".',
        'Write "{text}" without the letter "{x}".',
    ),
    "vowels": wordings(
        'Remove the vowels from "{text}".',
        'Delete all vowels in "{text}".',
        'Write "{text}" without vowels.',
    ),
    "double": wordings(
        'Double every letter of "{text}".',
        'Write each letter of "{text}" twice.',
        'Double each letter in "{text}".',
    ),
    "swap": wordings(
        'Swap the first and the last letter of "{text}".',
        'Exchange the first and last letters of "{text}".',
    ),
    "upper": wordings(
        'Write "{text}" in capitals.',
        'Write "{text}" in upper case.',
        'Make "{text}" upper case.',
        "Capitals: {text}",
    ),
    "before": wordings('Put "{x}" before "{text}".', 'Add "{x}" at the start of "{text}".'),
    "after": wordings('Put "{x}" after "{text}".', 'Add "{x}" at the end of "{text}".'),
    "cut start": wordings(
        'Remove the first {n} letters of "{text}".', 'Cut the first {n} letters off "{text}".'
    ),
    "cut end": wordings(
        'Remove the last {n} letters of "{text}".', 'Cut the last {n} letters off "{text}".'
    ),
}
_EDIT_NAMES = tuple(_EDITS)
_WITHOUT_VOWELS = str.maketrans("", "", "aeiou")


def _copyable(rng: random.Random) -> str:
    """One to eight words or numbers, sometimes written as a sentence."""
    parts = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5, 6, 8))):
        kind = rng.randrange(8)
        if kind == 0:
            part = str(rng.randint(0, 9999))
        elif kind < 4:
            part = rng.choice(NOUNS)
        else:
            part = pseudo_word(rng, rng.randint(1, 9))
        parts.append(part.capitalize() if rng.random() < 0.1 else part)
    text = " ".join(parts)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:] + rng.choice((".", "!", "?"))
    return text[:MAX_COPIED_CHARS].strip()


def copy(rng: random.Random) -> Example:
    text = _copyable(rng)
    return asked(rng, "copy", f"copy {text}", rng.choice(_COPY).format(text=text), text)


def reverse(rng: random.Random) -> Example:
    if rng.random() < _BARE_SHARE:
        text = rng.choice(NOUNS)
        question = rng.choice(_REVERSE_BARE).format(text=text)
        return asked(rng, "reverse", f"reverse {text}", question, text[::-1])
    if rng.random() < 0.15:
        text = "".join(rng.choices(string.digits, k=rng.randint(3, 10)))
    else:
        text = any_word(rng, *REVERSED_LETTERS)
    question = rng.choice(_REVERSE).format(text=text)
    return asked(rng, "reverse", f"reverse {text}", question, text[::-1])


def spell(rng: random.Random) -> Example:
    """Letters apart, or a word from its letters."""
    if rng.random() < _BARE_SHARE:
        text = rng.choice(NOUNS)
        question = rng.choice(_SPELL_BARE).format(text=text)
        return asked(rng, "spell", f"spell {text}", question, "-".join(text))
    text = any_word(rng, *SPELLED_LETTERS)
    key = f"spell {text}"
    how = rng.randrange(6)
    if how == 0:
        return asked(rng, "spell", key, rng.choice(_SPELL_APART).format(text=text), " ".join(text))
    if how == 1:
        question = rng.choice(_SPELL_CAPITALS).format(text=text)
        return asked(rng, "spell", key, question, "-".join(text.upper()))
    if how == 2:
        question = rng.choice(_UNSPELL).format(text="-".join(text))
        return asked(rng, "spell", key, question, text)
    return asked(rng, "spell", key, rng.choice(_SPELL).format(text=text), "-".join(text))


def letter(rng: random.Random) -> Example:
    """One letter of a word, by its place from the start or the end."""
    templates = _LETTER
    if rng.random() < _BARE_SHARE:
        text, templates = rng.choice(NOUNS), _LETTER_BARE
    elif rng.random() < 0.5:  # in words that can be spoken, one letter in ten is an "o"
        text = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 12)))
    else:
        text = any_word(rng, 4, 12)
    if rng.random() < 0.25:
        place, which = rng.choice(((-1, "last"), (-2, "second to last")))
    else:
        place = rng.randrange(min(len(text), len(ORDINALS)))
        which = ORDINALS[place]
    question = rng.choice(templates).format(which=which, text=text)
    return asked(rng, "letter", f"letter {which} {text}", question, text[place])


def edit(rng: random.Random) -> Example:
    """One change to a word."""
    name = rng.choice(_EDIT_NAMES)
    text = any_word(rng, *EDITED_LETTERS)
    x = y = ""
    n = 0
    if name == "replace":
        x, y = rng.choice(text), rng.choice(string.ascii_lowercase)
        answer = text.replace(x, y)
    elif name == "remove":
        x = rng.choice(text)
        answer = text.replace(x, "")
    elif name == "vowels":
        answer = text.translate(_WITHOUT_VOWELS)
    elif name == "double":
        answer = "".join([c + c for c in text])
    elif name == "swap":
        answer = text[-1] + text[1:-1] + text[0]
    elif name == "upper":
        answer = text.upper()
    elif name in ("before", "after"):
        x = pseudo_word(rng, rng.randint(1, 3))
        answer = x + text if name == "before" else text + x
    else:
        n = rng.randint(2, min(4, len(text) - 1))
        answer = text[n:] if name == "cut start" else text[:-n]
    if not answer:  # nothing but vowels, or the one letter to remove
        return edit(rng)
    question = rng.choice(_EDITS[name]).format(text=text, x=x, y=y, n=n)
    return asked(rng, "edit", f"edit {name} {x} {y} {n} {text}", question, answer)
