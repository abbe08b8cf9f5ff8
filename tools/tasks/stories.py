"""Short stories from a grammar: a beginning, something that happens, an end.

A story is one sentence of each of five or six groups, in their order; it is about whom and where
was asked for. The check reads the story back with the same grammar.
"""

from __future__ import annotations

import random
import re
from functools import partial

from .example import Example, asked, wordings
from .words import ANIMALS, FOODS, NAMES, PLACES, THINGS, a, pronoun, some

# Slots: hero, place and animal are asked for; thing and food are the story's own.
_BEGINNING = (
    "One morning {hero} walked to the {place}.",
    "{hero} lived near the {place}.",
    "On a quiet day {hero} was alone at the {place}.",
    "Last summer {hero} came to the {place}.",
    "It was late when {hero} reached the {place}.",
)
_MEETING = (
    "There {they} met {an_animal}.",
    "Under a tree sat {an_animal}.",
    "Suddenly {an_animal} came out of the dark.",
    "{An_animal} was waiting there.",
)
_TROUBLE = (
    "The {animal} had lost a {thing}.",
    "The {animal} was very hungry.",
    "The {animal} could not find the way home.",
    "The {animal} was sad and did not speak.",
    "The {animal} was looking for a friend.",
)
_HELP = (
    "{hero} gave the {animal} some {food}.",
    "{hero} found a {thing} and gave it to the {animal}.",
    "{hero} took the {animal} by the hand and showed the way.",
    "{hero} sang a song for the {animal}.",
    "So {hero} stayed and they talked all day.",
)
_TURN = (
    "Then the sun came out.",
    "The {animal} laughed and danced.",
    "After that the {place} was a happy place again.",
    "The {animal} said thank you.",
)
_END = (
    "They were friends from that day on.",
    "In the evening {hero} went home and slept well.",
    "{hero} never forgot the {animal}.",
    "And every year they meet again at the {place}.",
)
GRAMMAR: tuple[tuple[tuple[str, ...], bool], ...] = (
    (_BEGINNING, True),
    (_MEETING, True),
    (_TROUBLE, True),
    (_HELP, True),
    (_TURN, False),
    (_END, True),
)
"""Groups of sentences in order, and whether a story must have one of the group."""

_A_THING = tuple(thing for thing in THINGS if thing[0] not in "aeiou")

_PROMPTS = wordings(
    "Write a short story about {hero} and {an_animal} at the {place}.",
    "Tell me a story about {hero}, {an_animal} and the {place}.",
    "Tell me a story about {hero} and {an_animal}. It happens at the {place}.",
    "Write a story: {hero}, {an_animal}, the {place}.",
    "Can you tell a story with {hero} and {an_animal} at the {place}?",
    "I want a story about {hero}. There should be {an_animal} and the {place} in it.",
)


def story(rng: random.Random) -> Example:
    hero, animal, place = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(PLACES)
    slots = _slots(hero, animal, place)
    sentences = [
        rng.choice(group).format(thing=rng.choice(_A_THING), food=some(rng.choice(FOODS)), **slots)
        for group, must in GRAMMAR
        if must or rng.random() < 0.5
    ]
    key = f"story {hero} {animal} {place}"
    check = partial(is_story, hero, animal, place)
    question = rng.choice(_PROMPTS).format(**slots)
    return asked(rng, "story", key, question, " ".join(sentences), check=check)


def is_story(hero: str, animal: str, place: str, text: str) -> bool:
    """Whether the text is a story of the grammar about them."""
    if not all(name in text for name in (hero, animal, place)):  # spares making the pattern
        return False
    return re.fullmatch(_pattern(hero, animal, place), text.strip()) is not None


def _pattern(hero: str, animal: str, place: str) -> str:
    slots = _slots(hero, animal, place)
    slots |= {"thing": f"(?:{'|'.join(_A_THING)})", "food": f"(?:{'|'.join(map(some, FOODS))})"}
    groups = []
    for at, (group, must) in enumerate(GRAMMAR):
        sentences = "|".join([sentence.replace(".", r"\.").format(**slots) for sentence in group])
        groups.append(f"(?:{' ' if at else ''}(?:{sentences})){'' if must else '?'}")
    return "".join(groups)


def _slots(hero: str, animal: str, place: str) -> dict[str, str]:
    an_animal = a(animal)
    return {
        "hero": hero,
        "they": pronoun(hero),
        "animal": animal,
        "an_animal": an_animal,
        "An_animal": an_animal.capitalize(),
        "place": place,
    }
