"""The files that a build leaves: always the same bytes for the same clips."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jobs.manifest.rows import KNOWN
from jobs.manifest.store import Clip, Remark

COLUMNS = ("path", "text", "language", "duration_s")
"""Those that every manifest has; start_s, end_s, segments and no_speech come where a clip has them, then the rest."""


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
            self._writers = {}
            for name in self._names:
                file = stack.enter_context(_aside(self._folder / name))
                self._writers[name] = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
                self._writers[name].writeheader()
            yield self

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
    with _aside(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "kind", "reason"))
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
def _aside(path: Path) -> Iterator[Any]:
    aside = path.with_name(f".{path.name}.new")
    try:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
