"""Transcripts from a table: CSV, TSV or JSON lines, by the column names that data sets use."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from jobs.manifest.row import Reject, Row
from jobs.manifest.rows import KNOWN, parse_optional, parse_segments
from jobs.manifest.sources.options import SourceOptions, language_code
from service.errors import Fault, InputError, ManifestError
from service.spec.csv_header import NO_ROW, PATH_NAMES, TEXT_NAMES, form_problem
from service.spec.utf8 import NOT_UTF8

SUFFIXES = {".csv", ".tsv", ".jsonl", ".ndjson"}

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")
"""Tables that stand in a folder with the audio that they are about."""

LANGUAGE_NAMES = ("language", "locale", "lang")
DURATION_NAMES = ("duration_s", "duration")

Record = tuple[int, dict[str, Any], Reject | None]
"""Line, cells by column, and what is wrong with the line."""


class TableSource:
    """A table with a row per clip.

    Raises:
        InputError: there is no such file, or it is of another kind.
    """

    def __init__(self, location: str, options: SourceOptions) -> None:
        location = str(metadata_of(Path(location)) or location)
        self._suffix = Path(location).suffix.lower()
        if self._suffix not in SUFFIXES:
            raise InputError([Fault("SOURCE", f"is none of {', '.join(sorted(SUFFIXES))}", location)])
        if "://" not in location and not Path(location).is_file():
            raise InputError([Fault("SOURCE", "no such file", location)])
        self._location, self._options = location, options
        if options.audio_root:
            self._root = options.audio_root if "://" in options.audio_root else str(Path(options.audio_root).absolute())
        else:
            self._root = location.rsplit("/", 1)[0] if "://" in location else str(Path(location).absolute().parent)

    def total(self) -> int:
        """Not known without reading the table."""
        return 0

    def rows(self) -> Iterator[Row]:
        """A row per line.

        Raises:
            ManifestError: the table cannot be read, has no row, or no column for path or text.
        """
        as_json = self._suffix in (".jsonl", ".ndjson")
        try:
            with fsspec.open(self._location, "rt", encoding="utf-8-sig", newline="") as file:
                records = _json_lines(file) if as_json else self._fields(file)
                columns: tuple[str, str] | None = None
                line = 0
                for line, record, fault in records:
                    if fault:
                        yield Row(f"line {line}", "", "", self._options.language, line, fault=fault)
                        continue
                    columns = columns or self._columns(record)
                    yield self._row(line, record, columns)
                if not line:
                    problem = "is empty; give a line of JSON for each clip" if as_json else NO_ROW
                    raise ManifestError([Fault(self._location, problem)])
        except OSError as error:
            raise ManifestError([Fault(self._location, f"cannot be read ({error.strerror or error})")]) from error
        except UnicodeDecodeError as error:
            raise ManifestError([Fault(self._location, NOT_UTF8)]) from error

    def _fields(self, file: Any) -> Iterator[Record]:
        # In TSV files of data sets a quote is a character like any other.
        tabs = self._suffix == ".tsv"
        if tabs:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        else:
            reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield reader.line_num, {}, Reject("bad-row", f"is not valid CSV: {error}")
                continue
            if header is None:
                header = [name.strip().lower() for name in fields or ()]
                if problem := form_problem(header, "\t" if tabs else ","):
                    raise ManifestError([Fault(self._location, problem)])
            elif fields is None:
                return
            elif fields:
                fault = None
                if any(field.strip() for field in fields[len(header) :]):
                    fault = Reject("bad-row", f"has {len(fields)} fields, and the header {len(header)}")
                filled = [*fields, *[""] * (len(header) - len(fields))]
                yield reader.line_num, dict(zip(header, filled, strict=False)), fault

    def _columns(self, record: dict[str, Any]) -> tuple[str, str]:
        found, faults = [], []
        for option, said, names in (
            ("--path-column", self._options.path_column, PATH_NAMES),
            ("--text-column", self._options.text_column, TEXT_NAMES),
        ):
            wanted = (said.lower(),) if said else names
            name = next((name for name in wanted if name in record), None)
            if name is None:
                message = f"has no column {' or '.join(wanted)} (it has {', '.join(map(str, record))}); give {option}"
                faults.append(Fault(self._location, message))
            found.append(name or "")
        if faults:
            raise ManifestError(faults)
        return found[0], found[1]

    def _row(self, line: int, record: dict[str, Any], columns: tuple[str, str]) -> Row:
        path_column, text_column = columns
        language_column = next((name for name in LANGUAGE_NAMES if name in record), "")
        plain = {name: plain_text(record.get(name)) for name in ("start_s", "end_s", "no_speech", "segments")}
        plain["duration_s"] = plain_text(next((record[name] for name in DURATION_NAMES if record.get(name)), ""))
        listed = record.get("segments")
        if isinstance(listed, list):
            plain["segments"] = ""
        values, problem = parse_optional(plain)
        if isinstance(listed, list) and not problem:
            try:
                values["segments"] = parse_segments(listed)
            except (ValueError, TypeError) as error:
                problem = f"segments is no list of [start_s, end_s, text] ({error})"
        path = plain_text(record.get(path_column)).strip()
        used = {path_column, text_column, language_column, *DURATION_NAMES, *KNOWN}
        return Row(
            name=path,
            path=path if not path or "://" in path or Path(path).is_absolute() else f"{self._root}/{path}",
            text=" ".join(plain_text(record.get(text_column)).split()),
            language=language_code(plain_text(record.get(language_column)), self._options.language),
            line=line,
            extras={name: plain_text(value) for name, value in record.items() if name and name not in used},
            fault=Reject("bad-row", problem) if problem else None,
            **values,
        )


def metadata_of(folder: Path) -> Path | None:
    """The table of a folder's audio, where there is one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _json_lines(file: Any) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("no object")
            yield number, {str(key).lower(): value for key, value in content.items()}, None
        except (ValueError, RecursionError) as error:
            yield number, {}, Reject("bad-row", f"is not valid JSON: {error}")


def plain_text(value: Any) -> str:
    """A cell as text: nothing for null, JSON for what is nested."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
