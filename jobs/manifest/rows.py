"""Reading a manifest: a CSV with `path` and `text`, and optionally `language`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

from service.errors import Fault, ManifestError

REQUIRED = ("path", "text")


@dataclass(frozen=True)
class Row:
    """One clip of a manifest; `line` is where it ends in the file, for messages."""

    line: int
    path: str
    text: str
    language: str


def read_rows(source: str, default_language: str) -> Iterator[Row]:
    """Stream a manifest's rows, each with an absolute path or URI for its audio.

    Raises:
        ManifestError: the file is missing, not UTF-8, or lacks a column.
    """
    try:
        with fsspec.open(source, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            if missing := [name for name in REQUIRED if name not in columns]:
                raise ManifestError(
                    [
                        Fault(
                            source,
                            f"no column {' and no column '.join(missing)} (found: {', '.join(columns) or 'none'})",
                        )
                    ]
                )
            for record in reader:
                language = (record.get("language") or "").strip().lower() or default_language
                path = (record["path"] or "").strip()
                yield Row(reader.line_num, _resolve(path, source), (record["text"] or "").strip(), language)
    except FileNotFoundError as error:
        raise ManifestError([Fault(source, "no such file")]) from error
    except UnicodeDecodeError as error:
        raise ManifestError([Fault(source, f"is not UTF-8 text (byte {error.start}); save it as UTF-8")]) from error
    except csv.Error as error:
        raise ManifestError([Fault(f"{source}, line {reader.line_num}", f"is not valid CSV: {error}")]) from error


def _resolve(path: str, source: str) -> str:
    if not path or "://" in path or Path(path).is_absolute():
        return path
    folder = source.rsplit("/", 1)[0] if "://" in source else str(Path(source).absolute().parent)
    return f"{folder}/{path}"
