"""Transcripts from file names: `0001__en__turn_it_on.wav`, or whatever a regular expression says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jobs.manifest.row import Reject, Row
from jobs.manifest.sources.folder import audio_files, count_audio, name_of, require_folder
from jobs.manifest.sources.options import SourceOptions, language_code
from service.errors import Fault, InputError


class NameSource:
    """A folder whose audio files are named by what is said in them.

    Raises:
        InputError: there is no such folder, or the pattern is unusable.
    """

    def __init__(self, location: str, options: SourceOptions) -> None:
        faults: list[Fault] = []
        try:
            self._folder = require_folder(location)
        except InputError as error:
            faults += error.faults
        try:
            self._pattern = re.compile(options.pattern)
            if "text" not in self._pattern.groupindex:
                faults.append(Fault("--pattern", "has no named group (?P<text>...)", options.pattern))
        except re.error as error:
            faults.append(Fault("--pattern", f"is not a valid regular expression ({error})", options.pattern))
        if faults:
            raise InputError(faults)
        self._language = options.language

    def total(self) -> int:
        """Audio files."""
        return count_audio(self._folder)

    def rows(self) -> Iterator[Row]:
        """A row per audio file."""
        return map(self._row, audio_files(self._folder))

    def _row(self, file: Path) -> Row:
        name, fault = name_of(file, self._folder)
        path = str(file.absolute())
        match = self._pattern.fullmatch(file.stem)
        if fault or match is None:
            reason = f"its name does not match the pattern {self._pattern.pattern}"
            return Row(name, path, "", self._language, fault=fault or Reject("no-transcript", reason))
        groups = {key: value or "" for key, value in match.groupdict().items()}
        text = " ".join(groups.pop("text").replace("_", " ").split())
        no_speech = bool(groups.pop("no_speech", ""))
        language = language_code(groups.pop("language", ""), self._language)
        if not text and not no_speech:
            fault = Reject("no-transcript", "its name holds no text")
        return Row(name, path, "" if no_speech else text, language, no_speech=no_speech, extras=groups, fault=fault)
