"""The one seam to where artifacts are kept: a root given by a local path or a URI, through fsspec.

Local paths are written aside and renamed, so that no half-written file is ever seen under its own name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from service.errors import InputError, NotFoundError

CHUNK = 1 << 20
PRIVATE_PREFIX = ".wj-"
"""Names that begin so are work in progress: never listed, never part of a result."""

LOCK = f"{PRIVATE_PREFIX}lock"
"""Held by the one run that may write under a root."""


class Storage:
    """The files under one root.

    Args:
        uri: a local path, or a URI that fsspec knows and whose driver is installed.

    Raises:
        InputError: the URI's protocol is unknown, or its driver is not installed.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/") or "/"
        try:
            self._fs, self._root = fsspec.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            raise InputError(f"storage {uri!r}: {error}; give a local path") from error
        self.is_local = "file" in ((self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol)

    def path(self, name: str = "") -> str:
        """The full path of `name` below the root, as users write it."""
        base = self._root if self.is_local else self.uri
        return f"{base}/{name}" if name else base

    def local(self, name: str = "") -> Path:
        """`name` as a path on this machine's file system.

        Raises:
            InputError: the root is not a local folder.
        """
        if not self.is_local:
            raise InputError(f"storage {self.uri!r}: this version keeps a run's files in a local or shared folder only")
        return Path(self.path(name))

    def fetch(self, name: str) -> Path:
        """A copy of a file or folder on this machine, to be read."""
        return self.local(name)

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name."""
        return bool(self._fs.exists(f"{self._root}/{name}" if name else self._root))

    def read_bytes(self, name: str) -> bytes:
        """The whole file.

        Raises:
            NotFoundError: there is none.
        """
        try:
            content: bytes = self._fs.cat_file(f"{self._root}/{name}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{self.path(name)}: no such file") from error
        return content

    def read_json(self, name: str) -> Any:
        """The file's JSON value."""
        return json.loads(self.read_bytes(name))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole, or not at all."""
        if not self.is_local:
            self._fs.pipe_file(f"{self._root}/{name}", content)
            return
        target = self.local(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=PRIVATE_PREFIX)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp's files are for their owner alone; artifacts are as readable as any other file.
            Path(aside).chmod(0o666 & ~_umask())
            Path(aside).replace(target)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise

    def write_text(self, name: str, content: str) -> None:
        """Write a UTF-8 text file whole, or not at all."""
        self.write_bytes(name, content.encode())

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, indented, keys in the order given."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """An empty folder to fill; when that has been done without an error it becomes the folder `name`, whole.

        On a local root it lies beside its final place, is flushed to the disk and renamed. What stood under that name
        is replaced.
        """
        if not self.is_local:
            with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as scratch:
                yield Path(scratch)
                self._fs.put(f"{scratch}/", f"{self._root}/{name}/", recursive=True)
            return
        target = self.local(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=PRIVATE_PREFIX))
        try:
            (aside / "new").mkdir()
            yield aside / "new"
            for path in (aside / "new").rglob("*"):
                _flush(path)
            if target.exists():
                target.rename(aside / "old")
            (aside / "new").rename(target)
            _flush(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def put_folder(self, source: Path, name: str) -> None:
        """Replace the folder `name` by a copy of `source`."""
        with self.new_folder(name) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)

    def folders(self, name: str) -> list[str]:
        """Names of the folders in the folder `name`, work in progress left out; none where there is no such folder."""
        path = f"{self._root}/{name}"
        if not self._fs.isdir(path):
            return []
        found = [
            entry["name"].rstrip("/").rsplit("/", 1)[-1]
            for entry in self._fs.ls(path, detail=True)
            if entry["type"] == "directory"
        ]
        return sorted(name for name in found if not name.startswith(PRIVATE_PREFIX))

    def sweep(self) -> None:
        """Delete what writers that were killed have left half-done; only while no other writer is at work."""
        if not self.is_local:
            return
        for path in sorted(self.local().rglob(f"{PRIVATE_PREFIX}*")):
            if path.name == LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file or folder if it is there."""
        if self.exists(name):
            self._fs.rm(f"{self._root}/{name}", recursive=True)

    def files(self) -> Iterator[tuple[str, int]]:
        """Every file below the root as (name, size in bytes), sorted by name, work in progress left out."""
        found = self._fs.find(self._root, detail=True)
        for path in sorted(found):
            name = path[len(self._root) :].lstrip("/")
            if not any(part.startswith(PRIVATE_PREFIX) for part in name.split("/")):
                yield name, int(found[path]["size"])

    def sha256(self, name: str) -> str:
        """SHA-256 of a file's content, read in pieces."""
        digest = hashlib.sha256()
        with self._fs.open(f"{self._root}/{name}", "rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
