"""What a root on object storage asks of the calls below it; s3.py and generic.py make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

PART = 8 << 20
"""Bytes of one part of a large upload or download; S3 wants 5 MiB or more. What is smaller is one call."""


@dataclass(frozen=True)
class Found:
    """An object as the store knows it."""

    size: int
    etag: str
    """Changes with the content."""
    sha256: str | None = None
    """As its upload wrote it down; None: it did not, or was not asked."""
    age_s: float | None = None
    """Seconds since it was written, by the store's own clock; None: not known."""


class Objects(Protocol):
    """The objects below one root, by name. What passes by itself is tried again in here.

    All calls raise StorageError where the store refuses them or fails for too long.
    """

    def listed(self, below: str = "") -> dict[str, Found]:
        """All objects, or those below a folder, sorted by name."""

    def folders(self, below: str) -> list[str]:
        """Names of the folders in a folder."""

    def look(self, name: str) -> Found | None:
        """One object, with what its upload wrote down; None: there is none."""

    def read(self, name: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        """A piece of an object.

        Raises:
            FileNotFoundError: there is none.
            FileExistsError: it is no longer the one with that etag.
        """

    def put(self, name: str, content: bytes, sha256: str, *, only_new: bool = False, instead_of: str = "") -> str:
        """Write an object in one call; returns its etag.

        Args:
            name: the object.
            content: of PART bytes or not much more.
            sha256: of the content, written down with it.
            only_new: only where there is none of that name.
            instead_of: only where the present one has this etag.

        Raises:
            FileExistsError: such a condition does not hold.
        """

    def upload(self, name: str, path: Path, sha256: str, advance: Callable[[int], None]) -> None:
        """Write a large file, going on with an earlier upload of it that was cut off."""

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects; those that are not there do not matter."""

    def abandon(self, below: str = "") -> None:
        """Delete the parts of uploads that were cut off, of an object or of all below a folder or the root."""
