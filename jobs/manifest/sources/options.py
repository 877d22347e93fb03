"""What all sources share: the options they are given, and helpers to fill a row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jobs.manifest.row import Row
from service.spec.languages import CODE_OF_NAME, LANGUAGES
from service.spec.manifests import LANGUAGE

DEFAULT_PATTERN = r"(?:[^_]+__)??(?:(?P<language>[a-z]{2}|haw|yue)__)?(?P<text>(?:(?!__).)+)"
"""Takes `turn_it_on.wav`, `0001__turn_it_on.wav`, `en__turn_it_on.wav` and `0001__en__turn_it_on.wav`."""


@dataclass(frozen=True)
class SourceOptions:
    """What a user may say of a source.

    Attributes:
        language: of clips for which the source gives none.
        pattern: regular expression over file names, with the groups `text` and, optionally, `language`, `no_speech`;
            other groups become columns.
        path_column: column of a table with the audio's path; None: found by its name.
        text_column: column with the transcript; None: found by its name.
        audio_root: folder that a table's paths are relative to; None: the table's own.
        dataset_config: name of a dataset's configuration.
        out: folder of the manifests: audio that is inside a dataset's tables goes below it.
    """

    language: str = LANGUAGE
    pattern: str = DEFAULT_PATTERN
    path_column: str | None = None
    text_column: str | None = None
    audio_root: str | None = None
    dataset_config: str | None = None
    out: Path = Path()


class Source(Protocol):
    """A stream of claims: this audio, this text."""

    def rows(self) -> Iterator[Row]:
        """Every clip; one that cannot be used carries its fault."""

    def total(self) -> int:
        """How many rows there will be; 0 where that is not known."""


def language_code(said: str, default: str) -> str:
    """Whisper's code for a language that a source names: `en-US`, `English`, `EN` are `en`. Others stay as they are."""
    word = said.strip().lower()
    if not word:
        return default
    primary = re.split("[-_]", word)[0]
    return next((code for code in (word, CODE_OF_NAME.get(word), primary) if code in LANGUAGES), None) or word
