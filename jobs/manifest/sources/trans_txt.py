"""Transcripts as LibriSpeech has them: `84-121123.trans.txt` with a line `84-121123-0000 GO DO YOU HEAR` per clip."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from jobs.manifest.row import Reject, Row
from jobs.manifest.sources.folder import AUDIO_SUFFIXES, audio_files, count_audio, name_of, require_folder
from jobs.manifest.sources.options import SourceOptions

SUFFIX = ".trans.txt"
_ID = re.compile(r"(?P<speaker>[^-]+)-(?P<chapter>[^-]+)-[^-]+")


def has_trans_txt(folder: Path) -> bool:
    """Whether a folder is of this kind."""
    return next(folder.rglob(f"*{SUFFIX}"), None) is not None


class TransTxtSource:
    """A folder with LibriSpeech's transcripts. Speaker and chapter become columns.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, location: str, options: SourceOptions) -> None:
        self._folder = require_folder(location)
        self._language = options.language

    def total(self) -> int:
        """Audio files."""
        return count_audio(self._folder)

    def rows(self) -> Iterator[Row]:
        """A row per audio file, and one for each line whose file is missing."""
        known: tuple[Path, dict[str, str]] | None = None
        for file in audio_files(self._folder):
            # The files of a folder come one after another: its transcripts are read once.
            if known is None or known[0] != file.parent:
                lines, faults = self._lines(file.parent)
                known = (file.parent, lines)
                yield from faults
            yield self._row(file, known[1])

    def _lines(self, folder: Path) -> tuple[dict[str, str], list[Row]]:
        """The transcripts of a folder's clips, and what is wrong with them: unreadable files, lines without a clip."""
        lines: dict[str, str] = {}
        faults = []
        names = {file.stem for file in folder.iterdir() if file.name.lower().endswith(AUDIO_SUFFIXES)}
        for transcripts in sorted(folder.glob(f"*{SUFFIX}")):
            shown = transcripts.relative_to(self._folder)
            try:
                content = transcripts.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                fault = Reject("no-transcript", f"cannot be read ({error})")
                faults.append(Row(shown.as_posix(), "", "", self._language, fault=fault))
                continue
            for number, line in enumerate(content, 1):
                identity, _, text = line.strip().partition(" ")
                if not identity:
                    continue
                lines[identity] = " ".join(text.split())
                if identity not in names:
                    fault = Reject("missing", f"no audio file for line {number} of {transcripts.name}")
                    faults.append(Row((shown.parent / identity).as_posix(), "", "", self._language, fault=fault))
        return lines, faults

    def _row(self, file: Path, lines: dict[str, str]) -> Row:
        name, fault = name_of(file, self._folder)
        path = str(file.absolute())
        if fault is None and file.stem not in lines:
            fault = Reject("no-transcript", f"no {SUFFIX} file of its folder has a line for it")
        if fault:
            return Row(name, path, "", self._language, fault=fault)
        match = _ID.fullmatch(file.stem)
        return Row(name, path, lines[file.stem], self._language, extras=match.groupdict() if match else {})
