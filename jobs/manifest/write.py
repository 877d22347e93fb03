"""The files that a build leaves: always the same bytes for the same clips."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from jobs.manifest.rows import KNOWN
from jobs.manifest.store import Clip, Remark
from service.writing import aside

TRAIN, VAL, WARNINGS = "train.csv", "val.csv", "warnings.csv"

COLUMNS = ("path", "text", "language", "duration_s")
"""Those that every manifest has; start_s, end_s, segments and no_speech come where a clip has them, then the rest."""

REMARKS = ("path", "kind", "reason")
"""Columns of rejects and warnings."""


class SplitWriter:
    """Writes clips to one of several CSVs in a single pass; they come under their names when all of them are whole.

    Args:
        folder: where to; made if it is not there.
        names: the files.
        columns: optional and carried-along columns to write.
    """

    def __init__(self, folder: Path, names: Iterable[str], columns: set[str]) -> None:
        self._folder = folder
        optional = [name for name in KNOWN if name in columns and name not in COLUMNS]
        self._columns = [*COLUMNS, *optional, *sorted(columns - set(KNOWN))]
        self._names = list(names)
        self.clips = dict.fromkeys(self._names, 0)
        self.seconds = dict.fromkeys(self._names, 0.0)

    @contextmanager
    def open(self) -> Iterator[SplitWriter]:
        """Write inside this context."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = [stack.enter_context(written_aside(self._folder / name)) for name in self._names]
            self._writers = {
                name: csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
                for name, file in zip(self._names, files, strict=True)
            }
            for writer in self._writers.values():
                writer.writeheader()
            yield self
            for file in files:
                file.flush()  # a disk that is full shows before the first of them takes its place

    def write(self, name: str, clip: Clip) -> None:
        """Add a clip to a file."""
        values: dict[str, Any] = dict(clip.extras) if clip.extras else {}
        values |= {"path": relative(clip.path, self._folder), "text": clip.text, "language": clip.language}
        values["duration_s"] = f"{clip.duration_s:.3f}"
        if clip.start_s is not None:
            values["start_s"] = f"{clip.start_s:.3f}"
        if clip.end_s is not None:
            values["end_s"] = f"{clip.end_s:.3f}"
        if clip.segments:
            values["segments"] = clip.segments
        if clip.no_speech:
            values["no_speech"] = "true"
        self._writers[name].writerow({key: value for key, value in values.items() if key in self._columns})
        self.clips[name] += 1
        self.seconds[name] += clip.duration_s


def write_remarks(path: Path, remarks: Iterable[Remark]) -> int:
    """Write rejects or warnings as path, kind, reason; returns how many there were."""
    count = 0
    with written_aside(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(REMARKS)
        for remark in remarks:
            writer.writerow((remark.name, remark.kind, remark.reason))
            count += 1
    return count


def relative(path: str, folder: Path) -> str:
    """A path as a manifest in that folder has it, `/` between its parts; URIs stay as they are."""
    if "://" in path:
        return path
    return os.path.relpath(path, folder.absolute()).replace(os.sep, "/")


@contextmanager
def written_aside(path: Path) -> Iterator[TextIO]:
    """A new text file that takes its place when it is whole."""
    with aside(path) as beside, open(beside, "w", encoding="utf-8", newline="") as file:
        yield file
