"""Utterances of evaluation/*.jsonl: read, and joined over the models that have heard them."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from service.spec.languages import WITHOUT_SPACES


@dataclass(frozen=True)
class Line:
    """What one model heard in one clip.

    Attributes:
        path: of the clip, as the manifest had it.
        errors: word edits after the normaliser.
        words: of the reference.
        compared_reference: the reference as it was compared; None: of a run by an earlier version.
        compared_hypothesis: what was heard, likewise.
    """

    path: str
    language: str
    duration_s: float
    reference: str
    hypothesis: str
    errors: int
    words: int
    compared_reference: str | None = None
    compared_hypothesis: str | None = None

    @property
    def wer(self) -> float:
        """As the scores count it: of a clip without words 0 where nothing was heard, else 1."""
        return self.errors / self.words if self.words else float(self.errors > 0)

    @property
    def is_exact(self) -> bool:
        """Whether the words that were compared are known."""
        return self.compared_reference is not None and self.compared_hypothesis is not None

    @cached_property
    def expected(self) -> list[str]:
        """Words of the reference."""
        return self._words(self.compared_reference, self.reference)

    @cached_property
    def heard(self) -> list[str]:
        """Words of the hypothesis."""
        return self._words(self.compared_hypothesis, self.hypothesis)

    def _words(self, compared: str | None, text: str) -> list[str]:
        return (plain(text, self.language) if compared is None else compared).split()


def plain(text: str, language: str) -> str:
    """Nearly what Whisper's basic normaliser makes of a text: no case, no punctuation, no marks.

    Only for runs of an earlier version, which did not keep what was compared.
    """
    kept = "".join(
        " " if unicodedata.category(character)[0] in "MSP" else character
        for character in unicodedata.normalize("NFKC", text.casefold())
    )
    return " ".join(kept.replace(" ", "") if language in WITHOUT_SPACES else kept.split())


def read_lines(content: bytes) -> list[Line]:
    """A file of utterances.

    Raises:
        ValueError, KeyError, TypeError: it is none.
    """
    # Not splitlines(): a transcript may hold U+2028 and its like, which JSON leaves as they are.
    return [_line(json.loads(text)) for text in content.decode("utf-8").split("\n") if text.strip()]


def _line(record: dict[str, Any]) -> Line:
    words = record["words"]
    return Line(
        path=str(record["path"]),
        language=str(record["language"]),
        duration_s=float(record["duration_s"]),
        reference=str(record["reference"]),
        hypothesis=str(record["hypothesis"]),
        errors=words["substitutions"] + words["deletions"] + words["insertions"],
        words=words["length"],
        compared_reference=record.get("compared_reference"),
        compared_hypothesis=record.get("compared_hypothesis"),
    )


def join(sides: Sequence[Sequence[Line]]) -> list[tuple[Line, ...]]:
    """The clips that every model has heard, in the order of the last of them.

    A clip is known by its file's name and its reference; where several are alike, by their order.
    """
    if not sides:
        return []
    known = [dict(_keyed(side)) for side in sides]
    common = set.intersection(*(set(one) for one in known))
    return [tuple(one[key] for one in known) for key in known[-1] if key in common]


def _keyed(lines: Iterable[Line]) -> Iterable[tuple[tuple[str, str, str, int], Line]]:
    seen: Counter[tuple[str, str, str]] = Counter()
    for line in lines:
        # The name alone: two runs may have had the same clips in different places.
        key = (line.path.rsplit("/", 1)[-1], line.reference, line.language)
        seen[key] += 1
        yield (*key, seen[key]), line


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them lie in."""
    parts = [path.split("/") for path in paths]
    shared = 0
    # Of what is left of each, at least the file's name.
    for folder in zip(*(one[:-1] for one in parts), strict=False):
        if len(set(folder)) > 1:
            break
        shared += 1
    return ["/".join(one[shared:]) for one in parts]


def rate(lines: Iterable[Line]) -> float | None:
    """Word error rate over utterances; None: there are none."""
    errors = words = found = 0
    for line in lines:
        errors, words, found = errors + line.errors, words + line.words, found + 1
    if not found:
        return None
    return errors / words if words else float(errors > 0)
