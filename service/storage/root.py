"""`Storage`: the files under one root, wherever it is."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from service.errors import ExistsError, Fault, InputError, NotFoundError, StorageError
from service.spec.paths import unknown_uri
from service.storage.generic import GenericObjects
from service.storage.local import LocalFiles
from service.storage.names import PRIVATE_PREFIX, Progress
from service.storage.objects import Objects
from service.storage.remote import RemoteFiles
from service.storage.retry import START_PATIENCE_S, Caller

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of whisper-jobs that has the driver of a protocol."""


class Storage:
    """The files under one root.

    Args:
        uri: a local path, or a URI that fsspec knows and whose driver is installed.
        progress: takes (bytes done, bytes in all) of uploads and downloads.
        patience_s: how long what passes by itself is tried again on object storage; None: some minutes.

    Raises:
        InputError: the URI's protocol is unknown, or its driver is not installed.

    All methods raise StorageError where object storage refuses a call, or fails for some minutes.
    """

    def __init__(self, uri: str, progress: Progress | None = None, patience_s: float | None = None) -> None:
        if problem := unknown_uri(uri):
            raise InputError(f"{uri}: {problem}")
        self.uri = uri.rstrip("/") or "/"
        try:
            fs, self._root = fsspec.url_to_fs(self.uri)
        except (ValueError, ImportError) as error:
            extra = EXTRAS.get(self.uri.split("://")[0])
            install = f'pip install ".[{extra}]" in the checkout of whisper-jobs'
            way_out = install if extra else "give a local path, s3:// or gs://"
            raise InputError(f"storage {uri!r}: {error}; {way_out}") from error
        self._protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
        self._fs = fs
        self.is_local = "file" in self._protocols
        self._files: LocalFiles | RemoteFiles
        if self.is_local:
            self._files = LocalFiles(Path(self._root))
        else:
            self._files = RemoteFiles(self.uri, self.objects(patience_s), progress)

    def objects(self, patience_s: float | None = None) -> Objects:
        """The calls of a remote root, with patience of their own."""
        call = Caller(self.uri, patience_s)
        if "s3" in self._protocols:
            from service.storage.s3 import S3Objects

            return S3Objects(self._root, call)
        return GenericObjects(self._fs, self._root, call)

    def require_access(self, *, write: bool = False) -> None:
        """Find out at once whether a remote root can be used, before anything is done.

        Args:
            write: whether it must also take objects, give them back and let them be deleted.

        Raises:
            InputError: it cannot; the message names the way out.
        """
        if self.is_local:
            return
        objects, name, content = self.objects(START_PATIENCE_S), f"{PRIVATE_PREFIX}{secrets.token_hex(8)}", b"probe"
        try:
            objects.folders("")
            if write:
                objects.put(name, content, "")
                objects.read(name)
                objects.remove([name])
        except (StorageError, FileNotFoundError) as error:
            raise InputError(str(error)) from error

    def path(self, name: str = "") -> str:
        """The full path of `name` below the root, as users write it."""
        base = self._root if self.is_local else self.uri
        return f"{base}/{name}" if name else base

    def local(self, name: str = "") -> Path:
        """`name` as a path on this machine's file system: of a local root only; see `fetch`.

        Raises:
            InputError: the root is not a local folder.
        """
        if not self.is_local:
            raise InputError(f"storage {self.uri!r}: is no local folder")
        return Path(self.path(name))

    def fetch(self, name: str) -> Path:
        """A readable copy, on this machine, of a file or folder: of a local root itself, of a remote one a download.

        Downloads are kept in a cache that the processes of a node share. A copy is used again only while the store has
        the very same object, and its hash was checked against what the upload wrote down.

        Raises:
            NotFoundError: there is none.
            VerificationError: what came is not what was written.
        """
        with self._named(name):
            return self._files.fetch(name)

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or folder of that name."""
        return self._files.exists(name)

    def read_bytes(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """The whole file, or `length` bytes of it from `start` on.

        Raises:
            NotFoundError: there is none.
        """
        with self._named(name):
            return self._files.read(name, start, length)

    def read_json(self, name: str) -> Any:
        """The file's JSON value."""
        return json.loads(self.read_bytes(name))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file whole, or not at all."""
        self._files.write(name, content)

    def write_text(self, name: str, content: str) -> None:
        """Write a UTF-8 text file whole, or not at all."""
        self.write_bytes(name, content.encode())

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file, indented, keys in the order given."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def create_bytes(self, name: str, content: bytes) -> None:
        """Write a file only if there is none of that name: of several writers, one wins.

        Raises:
            ExistsError: there is one.
        """
        try:
            self._files.create(name, content)
        except FileExistsError:
            text = "is there already: another process has written it, and it is left as it is"
            raise ExistsError([Fault(self.path(name), text)]) from None

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[Path]:
        """A path to fill, for a large file; when that has been done without an error it becomes `name`, whole."""
        with self._files.new_file(name) as path:
            yield path

    @contextlib.contextmanager
    def new_folder(self, name: str, last: str | None = None) -> Iterator[Path]:
        """An empty folder to fill; when that has been done without an error it becomes the folder `name`.

        What stood under that name is replaced. On a local root the new folder is renamed, whole. On a remote one its
        files are uploaded side by side.

        Args:
            name: the folder.
            last: the file that tells whether all of the others are there: uploaded after them.
        """
        with self._files.new_folder(name, last) as folder:
            yield folder

    def put_file(
        self, path: Path, name: str, *, sha256: str | None = None, advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Write a copy of a local file, whole or not at all.

        Args:
            path: the file.
            name: of the copy.
            sha256: what its content must be; None: what it is.
            advance: called with the number of bytes that have gone since the last call.

        Raises:
            InputError: it has changed meanwhile, or is another.
        """
        self._files.put_file(path, name, sha256, advance)

    def folders(self, name: str) -> list[str]:
        """Names of the folders in the folder `name`, work in progress left out; none where there is no such folder."""
        return sorted(name for name in self._files.folders(name) if not name.startswith(PRIVATE_PREFIX))

    def sweep(self, *, resumable: bool = False) -> None:
        """Delete what writers that were killed have left half-done; only while no other writer is at work.

        Args:
            resumable: also what could be gone on with: the parts of large uploads.
        """
        self._files.sweep(resumable=resumable)

    def remove(self, name: str) -> None:
        """Delete a file or folder if it is there."""
        self._files.remove(name)

    def files(self) -> Iterator[tuple[str, int]]:
        """Every file below the root as (name, size in bytes), sorted by name, work in progress left out."""
        return self._files.files()

    def sha256(self, name: str) -> str:
        """SHA-256 of a file's content, read in pieces.

        Raises:
            NotFoundError: there is none.
        """
        with self._named(name):
            return self._files.sha256(name)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{self.path(name)}: no such file") from error
