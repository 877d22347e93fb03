"""The CSV of a local manifest: where its clips lie, and the CSV that goes in its place."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath

from service.errors import Fault, ManifestError
from service.spec.check_files import csv_problem
from service.spec.paths import is_uri, unknown_uri
from service.spec.utf8 import NOT_UTF8, first_line_not_utf8
from service.upload.hashes import Files, LocalFile

AUDIO, CSVS = "audio", "csv"
"""Folders for clips and for CSVs."""

_BLOCK = 1_000

csv.field_size_limit(16 << 20)  # the segments of a long recording, as the job reads them


def row_faults(source: str, files: Files) -> Iterator[Fault]:
    """Look at the clips of a CSV; gives each row whose clip cannot be sent.

    Raises:
        ManifestError: it cannot be read, or is no CSV with a path and a text.
    """
    with contextlib.suppress(OSError), open(source, "rb") as file:
        if number := first_line_not_utf8(file):
            raise ManifestError([Fault(f"{source}, line {number}", NOT_UTF8)])
    if problem := csv_problem(Path(source)):
        raise ManifestError([Fault(source, problem)])
    rows = _rows(source)
    while block := list(islice(rows, _BLOCK)):
        files.look(row.path for row in block if row.path)
        for row in block:
            where = f"{source}, line {row.line}"
            if row.path is None and row.column >= 0 and row.column < len(row.fields):
                written = row.fields[row.column].strip()
                if problem := unknown_uri(written, "a path"):
                    yield Fault(where, problem, written)
            elif row.path and (problem := files.problem(row.path)):
                yield Fault(where, problem, row.fields[row.column].strip())
            elif row.path == "":
                yield Fault(where, "path is empty")


def clips_of(source: str, files: Files) -> Iterator[LocalFile]:
    """The clips of a CSV, one per row; those that cannot be sent are left out."""
    return (files[row.path] for row in _rows(source) if row.path and row.path in files)


def rewritten(source: str, files: Files) -> Iterator[bytes]:
    """The lines of the CSV that goes in place of a local one.

    Its clips stand there by their places in storage, relative to its own, so that a bucket may be mirrored or renamed.
    All else, and the numbers of its lines, is as it was.
    """
    writer = csv.writer(_Echo(), lineterminator="\n")
    for row in _rows(source):
        fields = row.fields
        if row.path and row.path in files:
            fields = [*fields[: row.column], f"../{clip_name(files[row.path])}", *fields[row.column + 1 :]]
        yield str(writer.writerow(fields)).encode()


def hash_rewritten(source: str, files: Files) -> tuple[str, int]:
    """SHA-256 and size of what `rewritten` gives."""
    digest, size = hashlib.sha256(), 0
    for line in rewritten(source, files):
        digest.update(line)
        size += len(line)
    return digest.hexdigest(), size


def clip_name(clip: LocalFile) -> str:
    """Where a clip goes, below the root of the uploads."""
    suffix = PurePath(clip.path).suffix.lower()
    return f"{AUDIO}/{clip.sha256[:2]}/{clip.sha256}{suffix if re.fullmatch(r'[.][a-z0-9]{1,8}', suffix) else ''}"


@dataclass(frozen=True, slots=True)
class _Row:
    """A record of a CSV, its header and blank lines too.

    Attributes:
        line: where it ends.
        column: number of the one with the path.
        path: of its clip on this machine, absolute; None: it has none here.
    """

    line: int
    fields: list[str]
    column: int
    path: str | None


def _rows(source: str) -> Iterator[_Row]:
    """The records of a CSV.

    Raises:
        ManifestError: it cannot be read.
    """
    folder, column = Path(source).absolute().parent, -1
    line = 0
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for fields in reader:
                path = None
                if column < 0 and fields:
                    column = [name.strip().lower() for name in fields].index("path")
                elif fields:
                    path = fields[column].strip() if column < len(fields) else ""
                    path = None if is_uri(path) else path and str(folder / path)
                line = reader.line_num
                yield _Row(line, fields, column, path)
    except (
        csv.Error,
        ValueError,
    ) as error:  # the latter: it has changed, and has no such column or is no text any more
        raise ManifestError([Fault(f"{source}, line {line + 1}", f"is not valid CSV: {error}")]) from None
    except OSError as error:
        raise ManifestError([Fault(source, f"cannot be read ({error.strerror or error})")]) from None


class _Echo:
    """Where a csv.writer writes to: it gives the line back."""

    def write(self, text: str) -> str:
        """The text."""
        return text
