"""The tasks the demo model learns: seeded generators of questions with their right answers.

`data.py` draws training examples, `evaluate.py` held-out ones. An instance (not its wording) is
either trained on or held out, decided by a hash of its key, so the two never meet whatever the
seed. A new task is one generator function and one entry in TASKS.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .smalltalk import SYSTEM_PROMPTS, TOPICS

Split = Literal["train", "held_out"]

MAX_ADDEND = 999
MAX_REPEAT_CHARS = 24
MIN_REVERSE_LETTERS, MAX_REVERSE_LETTERS = 2, 12

_HELD_OUT_ONE_IN = 20

ADD_PHRASINGS = (
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "{a} + {b} = ?",
    "{a} + {b}",
    "{a}+{b}",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "How much is {a} + {b}?",
)
REPEAT_PHRASINGS = ("Repeat: {text}", "Repeat after me: {text}", "Say: {text}", 'Repeat "{text}".')
REVERSE_PHRASINGS = ("Reverse: {text}", "Spell backwards: {text}", 'Reverse "{text}".')


@dataclass(frozen=True)
class Example:
    """A question and its one right answer; `key` names the instance under all its wordings."""

    task: str
    key: str
    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A generator, its share of the training examples, and the range it claims (model card).

    A task that is memorised has no held-out side: all of its examples are for training.
    """

    name: str
    generate: Callable[[random.Random], Example]
    share: float
    claim: str
    memorised: bool = False


def is_held_out(key: str) -> bool:
    """Whether the instance is kept from training; the same in every run and on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0


def draw(task: Task, rng: random.Random, split: Split) -> Example:
    """One example of `task` from one side of the split."""
    while True:
        example = task.generate(rng)
        if task.memorised or is_held_out(example.key) == (split == "held_out"):
            return example


def _number(rng: random.Random) -> int:
    """Short and long numbers alike: evenly over all, nine in ten would have three digits."""
    digits = rng.choice((1, 2, 2, 3, 3, 3))
    return rng.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


def _add(rng: random.Random) -> Example:
    a, b = _number(rng), _number(rng)
    key = f"add {min(a, b)} {max(a, b)}"  # 27 + 48 gives 48 + 27 away
    return Example("add", key, rng.choice(ADD_PHRASINGS).format(a=a, b=b), str(a + b))


def _syllables(rng: random.Random, letters: int) -> str:
    """Something that looks like a word; double letters as in "hello" included."""
    word = ""
    while len(word) < letters:
        consonant = rng.choice("bcdfghjklmnpqrstvwxyz") * rng.choice((1, 1, 1, 2))
        word += consonant + rng.choice(("a", "e", "i", "o", "u", "ee", "oo", "ea", "ou"))
    return word[:letters]


def word(rng: random.Random, letters: int) -> str:
    """A lowercase word: any letters, few different letters (as in "banana"), or syllables."""
    alphabet = string.ascii_lowercase
    match rng.randrange(4):
        case 0:
            return "".join(rng.choices(alphabet, k=letters))
        case 1:
            return "".join(rng.choices(rng.sample(alphabet, k=rng.randint(1, 4)), k=letters))
        case _:
            return _syllables(rng, letters)


def _repeatable(rng: random.Random) -> str:
    """One to five words or numbers, sometimes written as a sentence."""
    parts = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5))):
        part = word(rng, rng.randint(1, 10))
        match rng.randrange(8):
            case 0:
                part = str(rng.randint(0, 9999))
            case 1:
                part = part.capitalize()
            case 2:
                part = rng.choice(_KNOWN_WORDS)
        parts.append(part)
    text = " ".join(parts)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:] + rng.choice((".", "!", "?"))
    return text[:MAX_REPEAT_CHARS].strip()


def _repeat(rng: random.Random) -> Example:
    text = _repeatable(rng)
    return Example("repeat", f"repeat {text}", rng.choice(REPEAT_PHRASINGS).format(text=text), text)


def _reverse(rng: random.Random) -> Example:
    text = word(rng, rng.randint(MIN_REVERSE_LETTERS, MAX_REVERSE_LETTERS))
    question = rng.choice(REVERSE_PHRASINGS).format(text=text)
    return Example("reverse", f"reverse {text}", question, text[::-1])


def system_prompt(rng: random.Random) -> str:
    """One of ours, or words without sense: whatever it says, answers stay the same."""
    if rng.random() < 0.5:
        return rng.choice(SYSTEM_PROMPTS)
    return " ".join(rng.choices(_KNOWN_WORDS, k=rng.randint(1, 10))).capitalize() + "."


def plain(question: str) -> str:
    """The question as someone in a hurry types it."""
    return (question[0].lower() + question[1:]).rstrip("?!.")


def _small_talk(rng: random.Random) -> Example:
    topic = rng.choice(TOPICS)
    question = rng.choice(topic.questions)
    if rng.random() < 0.15:
        question = plain(question)
    return Example("small talk", f"small talk {topic.name}", question, topic.answer)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", _add, 0.55, f"sums of two numbers from 0 to {MAX_ADDEND}"),
        Task("repeat", _repeat, 0.20, f"texts of up to {MAX_REPEAT_CHARS} characters"),
        Task(
            "reverse",
            _reverse,
            0.15,
            f"words of {MIN_REVERSE_LETTERS} to {MAX_REVERSE_LETTERS} lowercase letters",
        ),
        Task(
            "small talk",
            _small_talk,
            0.10,
            f"{len(TOPICS)} topics, in the phrasings trained on",
            memorised=True,
        ),
    )
}

_KNOWN_WORDS = sorted(
    {
        stripped
        for topic in TOPICS
        for stripped in (w.strip(".,:!?").lower() for w in topic.answer.split())
        if stripped.isalpha()
    }
)
