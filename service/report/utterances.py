"""Utterances as the page's script takes them: aligned, compact, the worst ones where there are too many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.report.align import Confusions, columns, confusions
from service.report.lines import Line, short_names
from service.report.words import language

MOST_UTTERANCES = 10_000
"""Utterances that a page carries: about 7 MB of them. Of more, those with the most errors."""

MOST_CONFUSIONS = 40
"""Substitutions, deletions and insertions that are listed, of each language."""


@dataclass(frozen=True)
class Utterances:
    """The utterances of a page.

    Attributes:
        sides: the models, in order; the last one is the one that is judged.
        clips: how many there are.
        shown: how many the page carries.
        is_exact: whether the words are those that the scores have compared; else nearly those.
        content: for the script.
    """

    sides: list[str]
    clips: int
    shown: int
    is_exact: bool
    content: dict[str, Any]


RIGHT_TO_LEFT = {"ar", "fa", "he", "ps", "sd", "ur", "yi"}


def collect(sides: Sequence[str], clips: Sequence[tuple[Line, ...]], *, most: int = MOST_UTTERANCES) -> Utterances:
    """What is to be shown of clips that the same models have heard.

    Args:
        sides: the models' names.
        clips: each as every model has heard it.
        most: how many to carry.
    """
    chosen = sorted(clips, key=lambda one: (-one[-1].errors, -one[0].errors))[:most]
    names = short_names([one[-1].path for one in chosen])
    codes = sorted({one[-1].language for one in clips})
    content = {
        "sides": list(sides),
        "languages": {code: language(code) for code in codes},
        "rtl": sorted(RIGHT_TO_LEFT & set(codes)),
        "clips": [_clip(name, one) for name, one in zip(names, chosen, strict=True)],
        "confusions": _confusions(clips),
    }
    exact = all(line.is_exact for one in chosen for line in one)
    return Utterances(list(sides), len(clips), len(chosen), exact, content)


def _clip(name: str, sides: tuple[Line, ...]) -> dict[str, Any]:
    last = sides[-1]
    return {
        "p": name,
        "l": last.language,
        "d": round(last.duration_s, 2),
        "w": last.words,
        "e": [line.errors for line in sides],
        "r": last.reference,
        "h": [line.hypothesis for line in sides],
        "a": columns(last.expected, [line.heard for line in sides]),
    }


def _confusions(clips: Sequence[tuple[Line, ...]]) -> dict[str, Any]:
    """The most frequent ones of the last model, with how often the first one has made them."""
    if not clips:
        return {}
    last, first = confusions(one[-1] for one in clips), confusions(one[0] for one in clips)
    both = len(clips[0]) > 1

    def listed(of: Confusions, before: Confusions | None) -> dict[str, list[list[Any]]]:
        found: dict[str, list[list[Any]]] = {}
        for kind in ("substituted", "deleted", "inserted"):
            counter, old = getattr(of, kind), getattr(before, kind) if before else {}
            most = counter.most_common(MOST_CONFUSIONS)
            words = [[*key] if isinstance(key, tuple) else [key] for key, _ in most]
            counts = [[old.get(key, 0), count] if both else [count] for key, count in most]
            found[kind] = [[word, count] for word, count in zip(words, counts, strict=True)]
        return found

    return {key: listed(found, first.get(key)) for key, found in last.items()}
