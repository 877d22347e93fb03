"""Words beside words: where a model heard others than were said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rapidfuzz.distance import Levenshtein

from service.report.lines import Line


@dataclass
class Heard:
    """What became of a reference's words.

    Attributes:
        words: for each of them what was heard in its place; None: nothing.
        inserted: what was heard before each of them, and (the last entry) after all.
    """

    words: list[str | None]
    inserted: list[list[str]]


def align(expected: Sequence[str], heard: Sequence[str]) -> Heard:
    """The alignment with the fewest edits: rapidfuzz's, which is also the one behind jiwer's counts.

    Args:
        expected: the reference's words.
        heard: the hypothesis's words.
    """
    found = Heard([None] * len(expected), [[] for _ in range(len(expected) + 1)])
    for code in Levenshtein.opcodes(expected, heard):
        if code.tag == "insert":
            found.inserted[code.src_start] += heard[code.dest_start : code.dest_end]
        elif code.tag != "delete":
            found.words[code.src_start : code.src_end] = heard[code.dest_start : code.dest_end]
    return found


SAME, NOTHING = 1, 0

Cell = str | int
"""A word; SAME: the reference's own; NOTHING: none."""


def columns(expected: Sequence[str], sides: Sequence[Sequence[str]]) -> list[list[Cell]]:
    """Reference and hypotheses under each other, word by word.

    Args:
        expected: the reference's words.
        sides: each model's words.

    Returns:
        columns of [word of the reference or NOTHING, then for each model its word, SAME or NOTHING].
    """
    aligned = [align(expected, side) for side in sides]
    made: list[list[Cell]] = []
    for index in range(len(expected) + 1):
        extra = [one.inserted[index] for one in aligned]
        for place in range(max(map(len, extra), default=0)):
            made.append([NOTHING, *(words[place] if place < len(words) else NOTHING for words in extra)])
        if index < len(expected):
            word, found = expected[index], [one.words[index] for one in aligned]
            made.append([word, *(NOTHING if one is None else SAME if one == word else one for one in found)])
    return made


@dataclass
class Confusions:
    """How often which word was taken for which, left out, or put in."""

    substituted: Counter[tuple[str, str]] = field(default_factory=Counter)
    deleted: Counter[str] = field(default_factory=Counter)
    inserted: Counter[str] = field(default_factory=Counter)

    def add(self, expected: Sequence[str], heard: Sequence[str]) -> None:
        """Count one utterance."""
        found = align(expected, heard)
        for word, other in zip(expected, found.words, strict=True):
            if other is None:
                self.deleted[word] += 1
            elif other != word:
                self.substituted[word, other] += 1
        self.inserted.update(word for words in found.inserted for word in words)


def confusions(lines: Iterable[Line]) -> dict[str, Confusions]:
    """Over all utterances (under "") and over those of each language."""
    found: dict[str, Confusions] = {"": Confusions()}
    for line in lines:
        for key in {"", line.language}:
            found.setdefault(key, Confusions()).add(line.expected, line.heard)
    return found
