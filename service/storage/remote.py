"""A root on object storage: what is written is read back, folders are made aside, reads of files are copies here."""

from __future__ import annotations

import contextlib
import hashlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from service.errors import StorageError
from service.storage.cache import Cache
from service.storage.names import LOCK, Progress, below, changed, is_private, sha256_of
from service.storage.objects import PART, Found, Objects
from service.storage.transfer import Meter, download, hash_of, in_parallel

_TRIES = 3
"""How often what is not read back as it was written is written."""


class RemoteFiles:
    """The files below one URI. See `Storage` for what the methods do.

    Args:
        uri: the root.
        objects: makes the calls.
        progress: hears of large transfers.
    """

    def __init__(self, uri: str, objects: Objects, progress: Progress | None) -> None:
        self.objects, self.progress = objects, progress
        self._uri, self._cache = uri, Cache(uri)

    def exists(self, name: str) -> bool:
        return bool(name and self.objects.look(name)) or bool(self.objects.listed(name))

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self.objects.read(name, start, length)

    def write(self, name: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        for _ in range(_TRIES):
            self.objects.put(name, content, digest)
            if self.objects.read(name) == content:
                return
        raise self._not_as_written(name)

    def create(self, name: str, content: bytes) -> None:
        self.objects.put(name, content, hashlib.sha256(content).hexdigest(), only_new=True)
        # Some stores know nothing of conditions, and take every write.
        if self.objects.read(name) != content:
            raise FileExistsError(name)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as scratch:
            path = Path(scratch) / Path(name).name
            yield path
            self._upload({name: path})

    @contextlib.contextmanager
    def new_folder(self, name: str, last: str | None = None) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as scratch:
            yield Path(scratch)
            files = below(Path(scratch))
            seal = {file: files.pop(file) for file in (last,) if file in files}
            before = self.objects.listed(name)
            self._upload({f"{name}/{file}": path for file, path in files.items()})
            self.objects.remove(before.keys() - {f"{name}/{file}" for file in files | seal})
            self._upload({f"{name}/{file}": path for file, path in seal.items()})

    def put_file(self, path: Path, name: str, sha256: str | None, advance: Callable[[int], None]) -> None:
        self._upload_file(name, path, advance, sha256)

    def _upload(self, files: Mapping[str, Path]) -> None:
        meter = Meter(sum(path.stat().st_size for path in files.values()), self.progress)
        in_parallel(lambda name: self._upload_file(name, files[name], meter.advance), sorted(files))

    def _upload_file(self, name: str, path: Path, advance: Callable[[int], None], sha256: str | None = None) -> None:
        state, digest = _state(path), sha256_of(path)
        if sha256 not in (None, digest):
            raise changed(path)
        size = state[0]

        def sent(count: int) -> None:
            # Of a large file it is called with each part, and so before they become an object.
            if _state(path) != state:
                raise changed(path)
            advance(count)

        for turn in range(_TRIES):
            if turn:
                # Another process that sends the same file may be about to end, and what it leaves is as good.
                time.sleep(turn * random.uniform(0.5, 1.5))
                if self._holds(name, size, digest):
                    return
            if _state(path) != state:
                raise changed(path)
            if size > PART:
                # Another process that sends the same file may have ended this very upload: what is there now tells.
                with contextlib.suppress(FileNotFoundError):
                    self.objects.upload(name, path, digest, sent)
            else:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise changed(path)
                self.objects.put(name, content, digest)
                advance(size)
            if self._holds(name, size, digest):
                return
        raise self._not_as_written(name)

    def _holds(self, name: str, size: int, digest: str) -> bool:
        """Whether an object is what it should be, read back."""
        found = self.objects.look(name)
        if found is None or found.size != size or found.sha256 not in (digest, None):
            return False
        try:
            return self._hash(name, found) == digest
        except (FileExistsError, FileNotFoundError):  # replaced or removed while it was read
            return False

    def _hash(self, name: str, found: Found) -> str:
        return hash_of(lambda start, length: self.objects.read(name, start, length, found.etag), found.size)

    def _not_as_written(self, name: str) -> StorageError:
        return StorageError(
            f"{self._uri}/{name}: what is read back is not what was written, {_TRIES} times; another process writes "
            "there, or the store is at fault"
        )

    def folders(self, name: str) -> list[str]:
        return self.objects.folders(name)

    def sweep(self, *, resumable: bool) -> None:
        self.objects.remove(name for name in self.objects.listed() if is_private(name) and name != LOCK)
        if resumable:
            self.objects.abandon()

    def remove(self, name: str) -> None:
        self.objects.remove([*self.objects.listed(name), name])
        self.objects.abandon(name)

    def files(self) -> Iterator[tuple[str, int]]:
        for name, found in self.objects.listed().items():
            if not is_private(name):
                yield name, found.size

    def sha256(self, name: str) -> str:
        found = self.objects.look(name)
        if found is None:
            raise FileNotFoundError(name)
        return self._hash(name, found)

    def fetch(self, name: str) -> Path:
        for last in (False, True):
            objects = self._objects_of(name)
            if not objects:
                break
            try:
                return self._cache.get(name, objects, partial(self._download, name, objects))
            except (FileExistsError, FileNotFoundError):  # replaced or removed meanwhile
                if last:
                    raise
        raise FileNotFoundError(name)

    def _objects_of(self, name: str) -> dict[str, Found]:
        """The objects of a file ("") or a folder, by name below it."""
        if found := self.objects.look(name):
            return {"": Found(found.size, found.etag)}
        return {each[len(name) + 1 :]: found for each, found in self.objects.listed(name).items()}

    def _download(self, name: str, objects: Mapping[str, Found], target: Path) -> None:
        meter = Meter(sum(found.size for found in objects.values()), self.progress)

        def get(file: str) -> None:
            full = f"{name}/{file}" if file else name
            found = self.objects.look(full)
            if found is None or found.etag != objects[file].etag:
                raise FileExistsError(full)
            read = partial(self.objects.read, full, etag=found.etag)
            download(read, found.size, found.sha256, found.etag, target / file if file else target, meter)

        in_parallel(get, sorted(objects))


def _state(path: Path) -> tuple[int, int]:
    """What changes with a file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
