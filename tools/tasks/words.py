"""Names, places and things that the tasks speak of, and words that mean nothing.

Used by every family. The lists are short enough that a vocabulary of 2,000 has most of their words
as tokens, and long enough that no answer can be guessed.
"""

from __future__ import annotations

import random
import string


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    "Ada Alice Amy Anna Bella Carla Clara Dana Diana Dora Elena Ella Emma Erika Eva Fiona Flora "
    "Frida Grace Greta Hanna Helen Ida Ines Irene Iris Jana Jane Julia Kate Kira Laura Lea Lena "
    "Lily Lisa Lucy Maria Marta Maya Mia Mina Nadia Nina Nora Olga Paula Petra Rita Rosa Ruth Sara "
    "Silvia Sofia Stella Tina Vera Wanda Yara Zoe"
)
MEN = _words(
    "Adam Alan Albert Anton Arthur Ben Bruno Carl Chris Daniel David Dennis Dirk Edgar Emil Eric "
    "Felix Frank Fred George Gustav Hans Harry Henry Hugo Igor Ivan Jack Jacob James Jan Joel John "
    "Jonas Karl Kevin Lars Leo Leon Louis Lukas Marco Mark Martin Max Milan Nico Noah Oliver Omar "
    "Oscar Otto Paul Peter Ralph Robert Simon Theo Thomas Tim Tom Victor Walter"
)
NAMES = WOMEN + MEN
SURNAMES = _words(
    "Adler Baker Berg Brown Carter Cole Cook Dale Dunn Ellis Field Fisher Fox Gray Green Hall Hart "
    "Hill Hunt Keller King Lane Long Marsh Mason Miller Moore Page Park Reed Rivers Rose Scott "
    "Snow Stone Turner Vogel Ward West Wood Young"
)
CITIES = _words(
    "Athens Basel Berlin Boston Brussels Cairo Chicago Cologne Denver Dublin Florence Geneva "
    "Hamburg Havana Helsinki Istanbul Kyoto Lima Lisbon London Lyon Madrid Milan Montreal Moscow "
    "Mumbai Munich Nairobi Naples Osaka Oslo Paris Porto Prague Quito Riga Rome Santiago Seoul "
    "Sydney Tokyo Toronto Turin Venice Vienna Warsaw Zurich"
)
COLORS = _words("red blue green yellow black white brown orange purple pink gray silver")
ANIMALS = _words(
    "bear bird cat cow crab crow deer dog donkey duck eagle fish fox frog goat goose hare hen "
    "horse lion mole mouse otter owl ox parrot pig rabbit seal sheep snail snake spider swan tiger "
    "turtle whale wolf"
)
FOODS = _words(
    "apple apricot banana bean bread butter cabbage cake carrot cheese cherry cookie corn egg fig "
    "garlic grape honey leek lemon lime mango melon milk mint nut olive onion pasta peach pear "
    "pepper plum potato rice salad salt soup tea tomato"
)
THINGS = _words(
    "ball basket bell bench bicycle boat book bottle box broom brush bucket button camera candle "
    "card chair clock coat coin cup desk door drum flag flute fork glove guitar hammer hat jacket "
    "jar kettle key kite knife ladder lamp letter map mirror needle net paper pen pencil piano "
    "picture pillow plate pot radio ring rope rug scarf shirt shoe spoon stamp stone table tent "
    "towel toy train tray umbrella vase violin watch wheel window"
)
JOBS = _words(
    "actor architect artist baker barber builder butcher carpenter cook dancer dentist doctor "
    "driver engineer farmer gardener judge lawyer librarian musician nurse painter pilot plumber "
    "poet sailor singer tailor teacher waiter writer"
)
PLACES = _words(
    "bakery beach bridge castle cave farm forest garden harbor island lake library market meadow "
    "mill mountain museum park river school station tower valley village"
)
NOUNS = tuple(dict.fromkeys(ANIMALS + FOODS + THINGS + JOBS))

MONTHS = _words(
    "January February March April May June July August September October November December"
)
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_WOMEN = frozenset(WOMEN)
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = ("a", "e", "i", "o", "u", "ee", "oo", "ea", "ou")


def pronoun(name: str) -> str:
    """ "she" or "he"."""
    return "she" if name in _WOMEN else "he"


def plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return _IRREGULAR.get(noun, noun + "s")


_UNCOUNTED = frozenset(
    _words("bread butter cabbage corn garlic honey milk mint pasta rice salad salt soup tea cheese")
)
_IRREGULAR = {
    "goose": "geese",
    "mouse": "mice",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "ox": "oxen",
    "wolf": "wolves",
    "knife": "knives",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "leaf": "leaves",
}


def some(food: str) -> str:
    """What one likes or buys: apples, but cheese."""
    return food if food in _UNCOUNTED else plural(food)


def a(noun: str) -> str:
    """The noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def pseudo_word(rng: random.Random, letters: int) -> str:
    """A lowercase word: any letters, few different letters (as in "banana"), or syllables."""
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choices(string.ascii_lowercase, k=letters))
    if kind == 1:
        few = rng.sample(string.ascii_lowercase, k=rng.randint(1, 4))
        return "".join(rng.choices(few, k=letters))
    word = ""
    while len(word) < letters:  # double letters as in "hello" included
        word += rng.choice(_CONSONANTS) * rng.choice((1, 1, 1, 2)) + rng.choice(_VOWELS)
    return word[:letters]


def any_word(rng: random.Random, shortest: int, longest: int) -> str:
    """A word to work on, letter by letter: mostly one that means nothing, now and then a noun."""
    if rng.random() < 0.2:
        noun = rng.choice(NOUNS)
        if shortest <= len(noun) <= longest:
            return noun
    return pseudo_word(rng, rng.randint(shortest, longest))
