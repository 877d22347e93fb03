"""Copies of remote files on this machine: one per content, shared by the processes of a node, never stale."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

from service.storage.names import PRIVATE_PREFIX, below
from service.storage.objects import Found

VARIABLE = "WHISPER_JOBS_CACHE"
ROOTS = "whisper-jobs-roots"
"""All that is kept, and deleted, lies in this folder of the cache: it may hold other things."""

KEPT_DAYS = 7
"""Copies of a root that no process has asked for meanwhile are deleted."""


def cache_folder() -> Path:
    """Where copies are kept: $WHISPER_JOBS_CACHE, else the user's cache folder, else the system's temporary one."""
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser().absolute()
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "whisper-jobs"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        return usual
    except (OSError, RuntimeError):
        return Path(tempfile.gettempdir()) / f"whisper-jobs-{os.getuid()}"


def copies_of(uri: str) -> Path:
    """The folder for copies of what lies below a URI."""
    return cache_folder() / ROOTS / hashlib.sha256(uri.encode()).hexdigest()[:16]


def forget_unused() -> None:
    """Delete the copies of roots that no process has asked for in a while."""
    for folder in (cache_folder() / ROOTS).iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > KEPT_DAYS * 86_400:
                shutil.rmtree(folder)


class Cache:
    """The copies of one root's files.

    Args:
        uri: the root.
    """

    def __init__(self, uri: str) -> None:
        self._folder = copies_of(uri)

    def get(self, name: str, objects: Mapping[str, Found], fill: Callable[[Path], None]) -> Path:
        """A file or folder as it is in the store now.

        Args:
            name: file or folder below the root.
            objects: its files by name below it ("" for a file itself), as the store lists them: what the copy must be.
            fill: downloads them to a path; called by one process of this machine at a time, and again on the same path
                where that was cut off.
        """
        content = [(below, found.size, found.etag) for below, found in objects.items()]
        identity = hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()[:16]
        copies = self._folder / quote(name, safe="")
        place = copies / identity
        path = place / Path(name).name
        copies.mkdir(parents=True, exist_ok=True)
        with locked(copies / f"{PRIVATE_PREFIX}lock"):
            os.utime(self._folder)
            if place.exists() and _sizes(path) != {below: found.size for below, found in objects.items()}:
                shutil.rmtree(place)
            if not place.exists():
                aside = copies / f"{PRIVATE_PREFIX}{identity}"
                fill(aside / path.name)
                for earlier in copies.iterdir():
                    if earlier.is_dir() and earlier != aside:
                        shutil.rmtree(earlier, ignore_errors=True)
                aside.rename(place)
                forget_unused()
        return path


def _sizes(path: Path) -> dict[str, int]:
    if path.is_file():
        return {"": path.stat().st_size}
    return {name: file.stat().st_size for name, file in below(path).items()}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone, of all threads and processes of this machine."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
