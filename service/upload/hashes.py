"""Local files by their content."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from service.errors import Fault
from service.storage import CHUNK, Progress
from service.storage.transfer import Meter

Result = TypeVar("Result")

_BLOCK = 1_000
_THREADS = min(16, 4 * (os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file as it was when it was hashed."""

    path: str
    size: int
    sha256: str


class Files:
    """Local files, each looked at and hashed once, by absolute path."""

    def __init__(self) -> None:
        # A size before it is hashed; a text says why it cannot be sent.
        self._found: dict[str, int | str | LocalFile] = {}

    def __getitem__(self, path: str) -> LocalFile:
        found = self._found[path]
        if not isinstance(found, LocalFile):
            raise KeyError(path)
        return found

    def __contains__(self, path: str) -> bool:
        return isinstance(self._found.get(path), LocalFile)

    def look(self, paths: Iterable[str]) -> None:
        """See what there is, before `problem` and `hash`."""
        self._found.update(_each(_size_of, (path for path in paths if path not in self._found)))

    def problem(self, path: str) -> str:
        """Why a file cannot be sent; empty where it can."""
        found = self._found[path]
        return found if isinstance(found, str) else ""

    def hash(self, progress: Progress | None) -> list[Fault]:
        """Hash all that have been looked at and can be sent; returns what is wrong with those that cannot be read."""
        sizes = {path: size for path, size in self._found.items() if isinstance(size, int)}
        meter = Meter(sum(sizes.values()), progress)
        self._found.update(_each(lambda path: _hash(path, meter), sizes))
        return [Fault(path, found) for path in sizes if isinstance(found := self._found[path], str)]


def _each(function: Callable[[str], Result], paths: Iterable[str]) -> Iterator[tuple[str, Result]]:
    """Call a function with each path, some at a time; in blocks, since a pool holds all that it is given."""
    rest = iter(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        while block := list(islice(rest, _BLOCK)):
            yield from zip(block, pool.map(function, block), strict=True)


def _size_of(path: str) -> int | str:
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        return _reason(error)
    if stat.S_ISDIR(found.st_mode):
        return "is a folder"
    return found.st_size if stat.S_ISREG(found.st_mode) else "is no ordinary file"


def _hash(path: str, meter: Meter) -> LocalFile | str:
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                size += len(piece)
                meter.advance(len(piece))
    except OSError as error:
        return _reason(error)
    return LocalFile(path, size, digest.hexdigest())


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    return f"cannot be read ({(getattr(error, 'strerror', None) or str(error)).lower()})"
