"""Reading a manifest: a CSV with `path` and `text`; all other columns are optional.

language, duration_s; start_s and end_s of a clip inside a longer file; segments, a JSON list of [start_s, end_s, text]
from the file's begin; no_speech. Whatever else there is, is carried along.
"""

from __future__ import annotations

import csv
import json
import math
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import fsspec

from jobs.manifest.row import Reject, Row, Segment, join_text
from service.errors import Fault, ManifestError, NotFoundError
from service.spec.csv_header import COLUMNS, header_problem
from service.spec.languages import WITHOUT_SPACES
from service.spec.paths import is_stored, unknown_uri
from service.spec.utf8 import NOT_UTF8, first_line_not_utf8
from service.storage import Storage

KNOWN = (*COLUMNS, "language", "duration_s", "start_s", "end_s", "segments", "no_speech")
YES, NO = {"true", "1", "yes", "y"}, {"", "false", "0", "no", "n"}

csv.field_size_limit(16 << 20)  # the segments of a long recording; the default is 128 KiB


def read_rows(source: str, default_language: str, *, strict: bool = True) -> Iterator[Row]:
    """Stream a manifest's rows, each with an absolute path or URI for its audio.

    Args:
        source: path or URI of the CSV.
        default_language: of rows that name none.
        strict: refuse a file that is no CSV; else what is wrong with a line comes as the fault of a row, and reading
            goes on behind it.

    Raises:
        ManifestError: the file cannot be read, is not UTF-8 or no CSV, or lacks a column.
    """
    with _opened(source, strict=strict) as file:
        yield from _read(file, source, default_language, strict=strict)


def read_columns(source: str) -> list[str]:
    """The columns of a manifest, in small letters.

    Raises:
        ManifestError: the file cannot be read, or its first line is no manifest's.
    """
    with _opened(source, strict=False) as file:
        return _header(csv.reader(file, strict=True), source)


@contextmanager
def _opened(source: str, *, strict: bool) -> Iterator[TextIO]:
    if problem := unknown_uri(source, "a path"):
        raise ManifestError([Fault(source, problem)])
    try:
        errors = "strict" if strict else "surrogateescape"
        with fsspec.open(_at_hand(source), "rt", encoding="utf-8-sig", newline="", errors=errors) as file:
            yield file
    except (FileNotFoundError, NotFoundError) as error:
        raise ManifestError([Fault(source, "no such file")]) from error
    except OSError as error:
        raise ManifestError([Fault(source, f"cannot be read ({error.strerror or error})")]) from error
    except UnicodeDecodeError as error:
        with fsspec.open(_at_hand(source), "rb") as file:
            where = f"{source}, line {first_line_not_utf8(file) or 1}"
        raise ManifestError([Fault(where, NOT_UTF8)]) from error


def _read(file: TextIO, source: str, default_language: str, *, strict: bool) -> Iterator[Row]:
    reader = csv.reader(file, strict=True)
    columns = _header(reader, source)
    line = reader.line_num + 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            # The reader counts the rows that it has given out; after an error it goes on with the next line.
            if strict:
                raise ManifestError([Fault(f"{source}, line {line}", f"is not valid CSV: {error}")]) from error
            yield Row("", "", "", default_language, line, fault=Reject("bad-row", f"is not valid CSV: {error}"))
            line = reader.line_num + 1
            continue
        if fields is None:
            break
        if fields:
            yield _row(columns, fields, reader.line_num, source, default_language)
        line = reader.line_num + 1


def _header(reader: Any, source: str) -> list[str]:
    try:
        columns = [name.strip().lower() for name in next(reader, ())]
    except csv.Error as error:
        raise ManifestError([Fault(f"{source}, line 1", f"is not valid CSV: {error}")]) from error
    if problem := _problem_of(columns):
        raise ManifestError([Fault(source, problem)])
    return columns


def _problem_of(columns: list[str]) -> str:
    if any("\udc80" <= character <= "\udcff" for name in columns for character in name):
        return NOT_UTF8
    if problem := header_problem(columns):
        return problem
    if doubled := [name for name in KNOWN if columns.count(name) > 1]:
        return f"has the column {doubled[0]} twice; keep one"
    return ""


def _row(columns: list[str], fields: list[str], line: int, source: str, default_language: str) -> Row:
    record = dict(zip(columns, [*fields, *[""] * (len(columns) - len(fields))], strict=False))
    path = record["path"].strip()
    fault = None
    if surplus := sum(bool(field.strip()) for field in fields[len(columns) :]):
        text = f"has more fields than the header, by {surplus}; put a text with commas in double quotes"
        fault = Reject("bad-row", text)
    elif any("\udc80" <= character <= "\udcff" for field in fields for character in field):
        fault = Reject("bad-row", NOT_UTF8)
    values, problem = parse_optional(record)
    if problem and fault is None:
        fault = Reject("bad-row", problem)
    language = record.get("language", "").strip().lower() or default_language
    text = record["text"].strip()
    if not text:
        text = join_text(values.get("segments", ()), spaces=language not in WITHOUT_SPACES)
    return Row(
        name=path,
        path=_resolve(path, source),
        text=text,
        language=language,
        line=line,
        extras={name: value for name, value in record.items() if name and name not in KNOWN},
        fault=fault,
        **values,
    )


def parse_optional(record: dict[str, str]) -> tuple[dict[str, Any], str]:
    """The optional columns as a Row's fields, and what is wrong with the first that cannot be read."""
    values: dict[str, Any] = {}
    for name in ("duration_s", "start_s", "end_s"):
        text = (record.get(name) or "").strip()
        if not text:
            continue
        try:
            number = float(text)
        except ValueError:
            return {}, f"{name} is {text!r}, which is no number of seconds"
        if not math.isfinite(number) or number < 0:
            return {}, f"{name} is {text!r}; give seconds from 0 on"
        values[name] = number
    if values.get("end_s", math.inf) <= values.get("start_s", 0.0):
        return {}, f"end_s is {values['end_s']:g}, and start_s is {values.get('start_s', 0.0):g}"
    said = (record.get("no_speech") or "").strip().lower()
    if said not in YES | NO:
        return {}, f"no_speech is {said!r}; give true or nothing"
    values["no_speech"] = said in YES
    if text := (record.get("segments") or "").strip():
        try:
            values["segments"] = parse_segments(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            return {}, f"segments is no JSON list of [start_s, end_s, text] ({error})"
    return values, ""


def parse_segments(content: Any) -> tuple[Segment, ...]:
    """Segments of a JSON list of [start_s, end_s, text], or of objects with start, end and text.

    Raises:
        ValueError, TypeError: it is none.
    """
    segments = []
    if not isinstance(content, list):
        raise ValueError("not a list")
    for entry in content:
        if isinstance(entry, dict):
            start_s, end_s = entry.get("start_s", entry.get("start")), entry.get("end_s", entry.get("end"))
            entry = [start_s, end_s, entry.get("text")]
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], str):
            raise ValueError(f"{json.dumps(entry, ensure_ascii=False)[:60]}")
        start_s, end_s = float(entry[0]), float(entry[1])
        if not math.isfinite(start_s) or not math.isfinite(end_s):
            raise ValueError(f"{entry[0]} or {entry[1]} is no time")
        if text := " ".join(entry[2].split()):
            segments.append(Segment(start_s, end_s, text))
    return tuple(segments)


def format_segments(segments: tuple[Segment, ...]) -> str:
    """Inverse of `parse_segments`, as JSON text; empty for none."""
    content = [[round(s.start_s, 3), round(s.end_s, 3), s.text] for s in segments]
    return json.dumps(content, ensure_ascii=False) if segments else ""


def _at_hand(source: str) -> str:
    """A CSV in object storage as a copy on this machine; any other as it is."""
    if not is_stored(source):
        return source
    folder, _, name = source.rpartition("/")
    return str(Storage(folder).fetch(name))


def _resolve(path: str, source: str) -> str:
    if not path or "://" in path or Path(path).is_absolute():
        return path
    if "://" not in source:
        return f"{Path(source).absolute().parent}/{path}"
    protocol, _, place = source.partition("://")
    # The names of objects know no `..`.
    return f"{protocol}://{posixpath.normpath(f'{posixpath.dirname(place)}/{path}')}"
