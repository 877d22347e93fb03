"""Where clips and their transcripts come from, one file per kind of source.

A source is a class with `rows()`, which streams Row after Row in any order, and `total()`. To add one, copy
`trans_txt.py` and give it a line in SOURCES.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs.manifest.sources.folder import audio_files, sidecars_of
from jobs.manifest.sources.hub import HubSource, is_dataset_folder
from jobs.manifest.sources.names import NameSource
from jobs.manifest.sources.options import DEFAULT_PATTERN, Source, SourceOptions
from jobs.manifest.sources.sidecars import SidecarSource
from jobs.manifest.sources.table import SUFFIXES, TableSource, metadata_of
from jobs.manifest.sources.trans_txt import TransTxtSource, has_trans_txt
from service.errors import Fault, InputError
from service.spec.manifests import AUTO
from service.spec.paths import unknown_uri

__all__ = ["DEFAULT_PATTERN", "SOURCES", "Source", "SourceOptions", "kind_of", "make_source"]

SOURCES: dict[str, Callable[[str, SourceOptions], Source]] = {
    "names": NameSource,
    "sidecars": SidecarSource,
    "table": TableSource,
    "trans-txt": TransTxtSource,
    "dataset": HubSource,
}

LOOKED_AT = 200
"""Audio files that are looked at to tell a folder with sidecar files from one whose names are the transcripts."""


def make_source(location: str, options: SourceOptions, kind: str = AUTO) -> Source:
    """The source behind a location.

    Raises:
        InputError: it cannot be used, or options do not fit it.
    """
    return SOURCES[kind_of(location) if kind == AUTO else kind](location, options)


def kind_of(location: str) -> str:
    """What kind of source a location is, by what is there.

    Raises:
        InputError: nothing is there, and it is no hub id.
    """
    if problem := unknown_uri(location, "a folder, a table"):
        raise InputError([Fault("SOURCE", problem, location)])
    path = Path(location)
    if path.is_file() or ("://" in location and path.suffix.lower() in SUFFIXES):
        if path.suffix.lower() not in SUFFIXES:
            known = ", ".join(sorted(SUFFIXES))
            raise InputError([Fault("SOURCE", f"is no folder and no table ({known})", location)])
        return "table"
    if not path.is_dir():
        owner, slash, name = location.partition("/")
        if slash and owner and name and "/" not in name and "." not in owner:
            return "dataset"
        raise InputError([Fault("SOURCE", "is not a folder, a table or a hub id (owner/name)", location)])
    if is_dataset_folder(path):
        return "dataset"
    if metadata_of(path):
        return "table"
    if has_trans_txt(path):
        return "trans-txt"
    for number, file in enumerate(audio_files(path), 1):
        if sidecars_of(file):
            return "sidecars"
        if number == LOOKED_AT:
            break
    return "names"
