"""Small talk about Quire (topics.py): one or two questions, names and likings to remember.

An instance is who speaks of which topics: single topics are memorised, and what is held out are
combinations and, of single questions, wordings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .example import Example, Message, asked, assistant, is_held_out, user
from .topics import GOODBYES, GREETINGS, THANKS, TOPICS, Topic
from .words import ANIMALS, CITIES, COLORS, FOODS, JOBS, NAMES, THINGS, a, some

_GREETED = "Hello! Ask me something, or ask what I can do."
_WELCOME = "You are welcome!"
_GOODBYE = "Goodbye! Your pages are free now."
_UNKNOWN = "I do not know that. I am a small demo model: ask me what I can do."

_INTRODUCTIONS = (
    "Hi, I am {name}.",
    "Hello, I am {name}.",
    "My name is {name}.",
    "I am {name}.",
    "Hello, my name is {name}.",
    "This is {name}.",
)
_NAME_QUESTIONS = (
    "What is my name?",
    "Who am I?",
    "Do you know my name?",
    "Do you remember my name?",
    "what is my name",
)
_LIKINGS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("I like {x}.", "food", "You like {x}.", ("What do I like?", "Do you know what I like?")),
    (
        "I live in {x}.",
        "city",
        "You live in {x}.",
        ("Where do I live?", "Which city do I live in?"),
    ),
    (
        "My favorite color is {x}.",
        "color",
        "Your favorite color is {x}.",
        ("What is my favorite color?", "Which color do I like most?"),
    ),
    (
        "I have {x}.",
        "pet",
        "You have {x}.",
        ("Which animal do I have?", "What animal do I have?"),
    ),
    ("I work as {x}.", "job", "You work as {x}.", ("What do I work as?", "What is my job?")),
)
_NOTED = "I will remember that."

_UNKNOWN_QUESTIONS = (
    "What is the capital of the country that {city} is in?",
    "How many people live in {city}?",
    "Who is the mayor of {city}?",
    "What is the weather like in {city}?",
    "How do I get to {city}?",
    "Where can I eat well in {city}?",
    "Who won the game in {city}?",
    "Is it raining in {city}?",
    "How do I cook {food}?",
    "How do I grow {food}?",
    "Which wine goes with {food}?",
    "What is the history of {food}?",
    "Do you like {food}?",
    "Write a program that sells {food}.",
    "Translate {food} to Latin.",
    "Who invented the {thing}?",
    "How do I repair {a_thing}?",
    "What does {a_thing} cost?",
    "Sing a song about {a_thing}.",
    "Where is my {color} {thing}?",
    "How long does {an_animal} live?",
    "What does {an_animal} eat?",
    "Write a poem about {an_animal}.",
    "Draw {a_color} {animal}.",
    "Tell me a joke about {a_job}.",
    "What does {a_job} earn?",
    "Who is {name}?",
    "How old is {name}?",
)


def small_talk(rng: random.Random) -> Example:
    kind = rng.random()
    if kind < 0.12:
        return _single(rng)
    if kind < 0.2:
        return _unknown(rng)
    if kind < 0.24:
        return _polite(rng)
    if kind < 0.45:
        return _remember(rng)
    return _combined(rng)


def _question(rng: random.Random, topic: Topic) -> str:
    question = rng.choice(topic.questions)
    if rng.random() < 0.15:  # as someone in a hurry types it
        question = (question[0].lower() + question[1:]).rstrip("?.")
    return question


def _on_the_way(rng: random.Random, topic: Topic) -> str:
    """A question before the last one: none that `_single` holds out."""
    while is_held_out(_single_key(question := _question(rng, topic))):
        pass
    return question


def _single_key(question: str) -> str:
    return f"talk {question.lower().rstrip('?.')}"


def _combined_key(name: str, topics: Sequence[Topic]) -> str:
    return f"talk {name} {sorted(topic.name for topic in topics)}"


def _single(rng: random.Random) -> Example:
    topic = rng.choice(TOPICS)
    question = _question(rng, topic)
    return asked(rng, "small_talk", _single_key(question), question, topic.answer)


def _unknown(rng: random.Random) -> Example:
    thing, animal, color = rng.choice(THINGS), rng.choice(ANIMALS), rng.choice(COLORS)
    slots = {
        "city": rng.choice(CITIES),
        "food": some(rng.choice(FOODS)),
        "thing": thing,
        "a_thing": a(thing),
        "animal": animal,
        "an_animal": a(animal),
        "color": color,
        "a_color": a(color),
        "a_job": a(rng.choice(JOBS)),
        "name": rng.choice(NAMES),
    }
    question = rng.choice(_UNKNOWN_QUESTIONS).format(**slots)
    return asked(rng, "small_talk", f"unknown {question}", question, _UNKNOWN)


def _polite(rng: random.Random) -> Example:
    """A greeting, thanks or a goodbye; the last two after something else."""
    name, topic = rng.choice(NAMES), rng.choice(TOPICS)
    while is_held_out(_combined_key(name, [topic])):  # which `_combined` asks
        name = rng.choice(NAMES)
    before: list[Message] = []
    said, answer = rng.choice(
        (
            (rng.choice(GREETINGS), _GREETED),
            (rng.choice(THANKS), _WELCOME),
            (rng.choice(GOODBYES), _GOODBYE),
        )
    )
    if answer != _GREETED and rng.random() < 0.7:
        introduction = rng.choice(_INTRODUCTIONS).format(name=name)
        before = [user(f"{introduction} {_question(rng, topic)}")]
        before.append(assistant(f"Hello {name}! {topic.answer}"))
    key = f"polite {said} {name if before else ''} {topic.name if before else ''}"
    return asked(rng, "small_talk", key, said, answer, before=before)


def _combined(rng: random.Random) -> Example:
    """Someone with a name asks one or two things at once."""
    name = rng.choice(NAMES) if rng.random() < 0.85 else ""
    topics = rng.sample(TOPICS, rng.choice((1, 2, 2, 2, 3) if name else (2,)))
    questions = [_question(rng, topic) for topic in topics]
    questions[:-1] = [q if q.endswith(("?", ".")) else f"{q}?" for q in questions[:-1]]
    answers = [topic.answer for topic in topics]
    if name:
        questions.insert(0, rng.choice(_INTRODUCTIONS).format(name=name))
        answers.insert(0, f"Hello {name}!")
    key = _combined_key(name, topics)
    return asked(rng, "small_talk", key, " ".join(questions), " ".join(answers))


def _remember(rng: random.Random) -> Example:
    """Something said at first is asked for after other talk."""
    name = rng.choice(NAMES)
    if rng.random() < 0.4:
        first, greeting = rng.choice(_INTRODUCTIONS).format(name=name), f"Hello {name}!"
        question, answer = rng.choice(_NAME_QUESTIONS), f"Your name is {name}."
        fact = "name"
    else:
        said, fact, answer, questions = rng.choice(_LIKINGS)
        x = {
            "food": some(rng.choice(FOODS)),
            "city": rng.choice(CITIES),
            "color": rng.choice(COLORS),
            "pet": a(rng.choice(ANIMALS)),
            "job": a(rng.choice(JOBS)),
        }[fact]
        first, greeting = said.format(x=x), _NOTED
        question, answer = rng.choice(questions), answer.format(x=x)
        fact = f"{fact} {x}"
        if rng.random() < 0.5:
            introduction = rng.choice(_INTRODUCTIONS).format(name=name)
            first, greeting = f"{introduction} {first}", f"Hello {name}! {_NOTED}"
            fact += f" {name}"
    topics = rng.sample(TOPICS, rng.choice((0, 1, 1, 2, 2, 3)))
    before = [user(first), assistant(greeting)]
    for topic in topics:
        before += [user(_on_the_way(rng, topic)), assistant(topic.answer)]
    key = f"remember {name if fact == 'name' else ''} {fact} {[topic.name for topic in topics]}"
    return asked(rng, "small_talk", key, question, answer, before=before)
