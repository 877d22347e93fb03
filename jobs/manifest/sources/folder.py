"""Folders of audio, walked without holding their lists in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jobs.audio import NOT_READ
from jobs.manifest.row import Reject
from service.errors import Fault, InputError, ManifestError

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aiff", ".aif", ".au", ".caf", *NOT_READ)

SIDECARS = (".json", ".vtt", ".srt", ".txt")
"""Files beside an audio file that may hold its transcript; the first one that is there is taken."""


def audio_files(folder: Path) -> Iterator[Path]:
    """Every audio file below a folder, links followed, in the order of the file system."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        found = place.stat()
        # A link may lead back to a folder above it.
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(Path(entry.path))
                elif entry.name.lower().endswith(AUDIO_SUFFIXES):
                    yield Path(entry.path)


def sidecars_of(file: Path) -> list[Path]:
    """The sidecar files that are there: `clip.txt` or `clip.wav.txt` for `clip.wav`."""
    names = (name for suffix in SIDECARS for name in (f"{file.stem}{suffix}", f"{file.name}{suffix}"))
    return [path for name in names if (path := file.with_name(name)).exists()]


def require_folder(location: str) -> Path:
    """The folder of that name.

    Raises:
        InputError: there is none.
    """
    if not Path(location).is_dir():
        raise InputError([Fault("SOURCE", "is not a folder", location)])
    return Path(location)


def name_of(file: Path, folder: Path) -> tuple[str, Reject | None]:
    """A file's name in reports, `/` between its parts; one that is no UTF-8 cannot stand in a CSV."""
    name = file.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        return name, Reject("bad-row", "its name is not UTF-8")
    return name, None


def count_audio(folder: Path) -> int:
    """How many audio files there are.

    Raises:
        ManifestError: there is none.
    """
    count = sum(1 for _ in audio_files(folder))
    if not count:
        raise ManifestError([Fault(str(folder), f"holds no audio ({', '.join(AUDIO_SUFFIXES[:6])}, ...)")])
    return count
