"""Where `manifest build` and `manifest check` write: tried before anything is decoded; nobody else's file is lost."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.manifest.write import COLUMNS, REMARKS, TRAIN, VAL, WARNINGS
from service.artifacts import REJECTS
from service.errors import Fault, InputError
from service.spec import look
from service.writing import require_file, require_folder

BUILT = (TRAIN, VAL, REJECTS, WARNINGS)
"""What a build writes."""


def require_build_place(out: Path, source: str, *, overwrite: bool) -> None:
    """Refuse a folder whose files a build would replace although no build has written them, or that takes no file.

    Args:
        out: the folder.
        source: what is built from.
        overwrite: replace others' files; never the source.

    Raises:
        InputError: with each file that would be lost, or the folder cannot be written.
        StorageError: its disk is full or read-only.
    """
    faults = [
        Fault("SOURCE", f"lies where --out writes {name}; give another folder", source)
        for name in BUILT
        if _same(source, out / name)
    ]
    if not faults and not overwrite:
        way_out = "give another folder, or --overwrite to replace it"
        faults = [Fault(str(out / name), f"was not written by a build; {way_out}") for name in _others(out)]
    if faults:
        raise InputError(faults)
    require_folder("--out", out)


def require_rejects_place(rejects: Path, sources: Sequence[str]) -> None:
    """Refuse a file for faults that would take the place of a CSV that is checked, or that cannot be written.

    Raises:
        InputError: it is one of the sources, a folder, or cannot be written.
        StorageError: its disk is full or read-only.
    """
    if any(_same(source, rejects) for source in sources):
        raise InputError([Fault("--rejects", "is one of the CSVs to check; give another file", str(rejects))])
    require_file("--rejects", rejects)


def _same(source: str, path: Path) -> bool:
    return "://" not in source and look.real(source) == look.real(path)


def _others(out: Path) -> Iterator[str]:
    """Files of the names that a build gives, which no build has written.

    A build leaves four files, of which the list of rejects comes first under its name: a train.csv without one was
    made by hand or by another tool.
    """
    has_rejects = _header(out / REJECTS) == REMARKS
    for name in BUILT:
        path = out / name
        if not look.is_file(path):
            continue
        header = _header(path)
        ours = header == REMARKS if name in (REJECTS, WARNINGS) else header[: len(COLUMNS)] == COLUMNS and has_rejects
        if not ours:
            yield name


def _header(path: Path) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return tuple(next(csv.reader(file), ()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return ()
