"""Names and small helpers that all of the storage shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from service.errors import Fault, InputError

CHUNK = 1 << 20
PRIVATE_PREFIX = ".wj-"
"""Names that begin so are work in progress: never listed, never part of a result."""

LOCK = f"{PRIVATE_PREFIX}lock"
"""Held by the one run that may write under a root."""

Progress = Callable[[int, int], None]
"""Takes (bytes done, bytes in all) of an upload or download."""


def is_private(name: str) -> bool:
    """Whether a name below the root is work in progress, or lies in such a folder."""
    return any(part.startswith(PRIVATE_PREFIX) for part in name.split("/"))


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def below(folder: Path) -> dict[str, Path]:
    """The files in a folder, by name below it, sorted."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def changed(path: Path) -> InputError:
    """A local file is no longer what was to be sent."""
    return InputError([Fault(str(path), "has changed while it was sent, and was not taken; the same command goes on")])
