"""A root that is a folder: what is written is written aside and renamed, so that nothing half-written is seen."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from service.storage.names import CHUNK, LOCK, PRIVATE_PREFIX, changed, is_private


class LocalFiles:
    """The files in one folder. See `Storage` for what the methods do.

    Args:
        root: the folder, which need not be there yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        with open(self.root / name, "rb") as file:
            file.seek(start)
            return file.read() if length is None else file.read(length)

    def write(self, name: str, content: bytes) -> None:
        with self.new_file(name) as path:
            path.write_bytes(content)

    def create(self, name: str, content: bytes) -> None:
        with self._aside(name) as path:
            path.write_bytes(content)
            _finish(path)
            try:
                # Unlike a rename, a link does not replace what is there.
                (self.root / name).hardlink_to(path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links: at least no other file is replaced
                with open(self.root / name, "xb") as file:
                    file.write(content)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        with self._aside(name) as path:
            yield path
            _finish(path)
            path.replace(self.root / name)

    @contextlib.contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=PRIVATE_PREFIX, suffix=target.suffix)
        os.close(handle)
        try:
            yield Path(aside)
        finally:
            Path(aside).unlink(missing_ok=True)

    @contextlib.contextmanager
    def new_folder(self, name: str, last: str | None = None) -> Iterator[Path]:
        target = self.root / name
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

    def put_file(self, path: Path, name: str, sha256: str | None, advance: Callable[[int], None]) -> None:
        digest = hashlib.sha256()
        with self.new_file(name) as target, open(path, "rb") as source, open(target, "wb") as copy:
            while piece := source.read(CHUNK):
                digest.update(piece)
                copy.write(piece)
                advance(len(piece))
            if sha256 not in (None, digest.hexdigest()):
                raise changed(path)

    def folders(self, name: str) -> list[str]:
        path = self.root / name
        return [entry.name for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []

    def sweep(self, *, resumable: bool) -> None:
        for path in sorted(self.root.rglob(f"{PRIVATE_PREFIX}*")):
            if path.name == LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def files(self) -> Iterator[tuple[str, int]]:
        paths = {path.relative_to(self.root).as_posix(): path for path in self.root.rglob("*") if path.is_file()}
        for name, path in sorted(paths.items()):
            if not is_private(name):
                yield name, path.stat().st_size

    def sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with open(self.root / name, "rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
        return digest.hexdigest()

    def fetch(self, name: str) -> Path:
        path = self.root / name
        if not path.exists():
            raise FileNotFoundError(path)
        return path


def _finish(path: Path) -> None:
    """Flush a new file to the disk, and give it the rights of any other: mkstemp's are for their owner alone."""
    _flush(path)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
