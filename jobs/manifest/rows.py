"""Reading a manifest: a CSV with `path` and `text`, and optionally `language`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

from service.errors import Fault, ManifestError

REQUIRED = ("path", "text")
_SURPLUS = "\0surplus"


@dataclass(frozen=True)
class Row:
    """One clip of a manifest; `line` is where it ends in the file, for messages."""

    line: int
    path: str
    text: str
    language: str
    surplus: int = 0
    """Fields beyond the header's that are not empty: a comma in the text that no quotes enclose."""


def read_rows(source: str, default_language: str) -> Iterator[Row]:
    """Stream a manifest's rows, each with an absolute path or URI for its audio.

    Raises:
        ManifestError: the file cannot be read, is not UTF-8 or no CSV, or lacks a column.
    """
    try:
        with fsspec.open(source, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey=_SURPLUS, strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            if problem := _header_problem(columns):
                raise ManifestError([Fault(source, problem)])
            for record in reader:
                language = (record.get("language") or "").strip().lower() or default_language
                path = (record["path"] or "").strip()
                text = (record["text"] or "").strip()
                surplus = sum(bool(field.strip()) for field in record.get(_SURPLUS) or ())
                yield Row(reader.line_num, _resolve(path, source), text, language, surplus)
    except FileNotFoundError as error:
        raise ManifestError([Fault(source, "no such file")]) from error
    except OSError as error:
        raise ManifestError([Fault(source, f"cannot be read ({error.strerror or error})")]) from error
    except UnicodeDecodeError as error:
        where = f"{source}, line {_first_line_not_utf8(source)}"
        raise ManifestError([Fault(where, "is not UTF-8 text; save the file as UTF-8")]) from error
    except csv.Error as error:
        # The reader counts the rows that it has given out.
        raise ManifestError([Fault(f"{source}, line {reader.line_num + 1}", f"is not valid CSV: {error}")]) from error


def _header_problem(columns: list[str]) -> str:
    if missing := [name for name in REQUIRED if name not in columns]:
        return f"no column {' and no column '.join(missing)} (found: {', '.join(columns) or 'none'})"
    if doubled := [name for name in (*REQUIRED, "language") if columns.count(name) > 1]:
        return f"has the column {doubled[0]} twice; keep one"
    return ""


def _first_line_not_utf8(source: str) -> int:
    with fsspec.open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _resolve(path: str, source: str) -> str:
    if not path or "://" in path or Path(path).is_absolute():
        return path
    folder = source.rsplit("/", 1)[0] if "://" in source else str(Path(source).absolute().parent)
    return f"{folder}/{path}"
