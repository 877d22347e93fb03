"""The rules of `data.text` applied: to transcripts before they are trained on or scored, and to what a model heard."""

from __future__ import annotations

import re
import unicodedata

from service.spec.text import TextRules

_QUOTES = str.maketrans("‘’‚‛′“”„‟″«»–—―‐‑", '\'\'\'\'\'"""""""-----')
_BRACKETS = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}|<[^<>]*>")
_INSIDE_WORDS = re.compile(r"(?<=\w)['’\-‐‑](?=\w)")


class TextNormaliser:
    """Puts a transcript into the form that a spec asks for.

    Args:
        rules: None: texts stay as they are.
    """

    def __init__(self, rules: TextRules | None) -> None:
        self._rules = rules
        self._replace = [(re.compile(rule.pattern), rule.by) for rule in rules.replace] if rules else []

    def __call__(self, text: str) -> str:
        """The text in that form."""
        rules = self._rules
        if rules is None:
            return text
        if rules.unicode != "keep":
            text = unicodedata.normalize(rules.unicode, text)
        if rules.quotes == "plain":
            text = text.translate(_QUOTES)
        if rules.brackets == "remove":
            text = _BRACKETS.sub(" ", text)
        for pattern, by in self._replace:
            text = pattern.sub(by, text)
        if rules.punctuation == "remove":
            text = _without_punctuation(text)
        if rules.case != "keep":
            text = text.lower() if rules.case == "lower" else text.upper()
        return " ".join(text.split())


def _without_punctuation(text: str) -> str:
    kept = {found.start() for found in _INSIDE_WORDS.finditer(text)}
    return "".join(
        " " if unicodedata.category(character).startswith("P") and index not in kept else character
        for index, character in enumerate(text)
    )
