"""Spoken commands in English and Spanish: small grammars with thousands of sentences each.

No digits and no number words: Whisper's English normaliser joins neighbouring numbers into one, and a WER over such
text would say little. The words are in lower case, without accents or punctuation, so that a file name can carry them,
and no two of them sound alike.
"""

import itertools
import random
from functools import cache

# Each pattern is a row of slots; a slot with several words offers a choice.
ENGLISH_SLOTS = {
    "switch": "turn",
    "act": "open close move clean watch",
    "ask": "find bring carry order",
    "say": "call thank follow",
    "the": "the my every",
    "colour": "yellow purple silver broken",
    "room": "kitchen garden office bedroom hallway",
    "thing": "light window curtain heater camera music",
    "goods": "coffee sugar umbrella breakfast paper",
    "person": "doctor mother teacher neighbour",
    "state": "on off",
    "when": "now again tomorrow slowly please",
}
ENGLISH_PATTERNS = [
    "switch the room thing state",
    "switch the thing state when",
    "act the room thing",
    "act the colour thing when",
    "act the room thing when",
    "ask the goods when",
    "ask the colour goods",
    "ask the colour goods when",
    "say the person when",
    "ask the room goods when",
]
SPANISH_SLOTS = {
    "act": "abre cierra mueve apaga busca",
    "the": "la mi esta",
    "thing": "puerta ventana silla mesa radio",
    "colour": "verde grande",
    "when": "ahora siempre despacio",
}
SPANISH_PATTERNS = ["act the thing", "act the thing colour", "act the thing when", "act the thing colour when"]

GRAMMARS = {"en": (ENGLISH_SLOTS, ENGLISH_PATTERNS), "es": (SPANISH_SLOTS, SPANISH_PATTERNS)}
LANGUAGES = tuple(GRAMMARS)


@cache
def all_sentences(language: str) -> tuple[str, ...]:
    """Every sentence of a language's grammar, each once, in a fixed order."""
    slots, patterns = GRAMMARS[language]
    choices = ([slots[slot].split() for slot in pattern.split()] for pattern in patterns)
    spoken = itertools.chain.from_iterable(itertools.product(*row) for row in choices)
    return tuple(dict.fromkeys(" ".join(words) for words in spoken))


def words(language: str) -> list[str]:
    """The vocabulary of a language, sorted."""
    return sorted({word for options in GRAMMARS[language][0].values() for word in options.split()})


def sample_sentences(language: str, count: int, seed: int) -> list[str]:
    """Draw `count` different sentences; the same seed draws the same ones.

    Raises:
        ValueError: the grammar has fewer sentences.
    """
    sentences = all_sentences(language)
    if count > len(sentences):
        raise ValueError(f"the {language} grammar has {len(sentences)} sentences, not {count}: ask for fewer")
    return random.Random(f"{language}-{seed}").sample(sentences, count)
