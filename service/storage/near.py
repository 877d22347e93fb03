"""Objects that are read again and again, such as clips: asked for once per node, and kept on its disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import astuple, dataclass
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath

from service.errors import VerificationError
from service.storage.cache import copies_of, forget_unused, locked
from service.storage.names import PRIVATE_PREFIX
from service.storage.objects import PART, Found, Objects
from service.storage.root import Storage
from service.storage.transfer import Meter, download, in_parallel, pieces

RESERVE = 1 << 30
"""Bytes of a disk that copies leave free: checkpoints and Ray need room too."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}
_TOUCH_EVERY_S = 3600.0
_touched: dict[Path, float] = {}


class ChangedError(OSError):
    """An object is no longer the one that was asked for."""


@dataclass(frozen=True)
class Version:
    """Which content of an object is meant."""

    size: int
    etag: str
    sha256: str | None = None

    def __str__(self) -> str:
        return json.dumps(astuple(self))

    @classmethod
    def parse(cls, text: str) -> Version:
        """Inverse of `str`."""
        return cls(*json.loads(text))

    @classmethod
    def of(cls, found: Found) -> Version:
        """What the store has now."""
        return cls(found.size, found.etag, found.sha256)


@dataclass(frozen=True)
class Near:
    """An object on this machine.

    Attributes:
        content: a file or, where the disk takes none, the bytes.
        version: which content it is.
    """

    content: Path | bytes
    version: Version


def fetch_near(uri: str, version: Version | None = None) -> Near:
    """An object as a file of this machine, which the node's processes share.

    With a version the store is asked nothing while a copy of it is here; without one, a look tells whether the copy is
    what the store has now. Where the disk takes no copy the bytes are handed on without one.

    Args:
        uri: of object storage.
        version: what it must be: `Near.version` of an earlier call, perhaps on another node.

    Raises:
        FileNotFoundError: there is no such object.
        ChangedError: it is no longer of that version.
        InputError: the protocol's driver is not installed.
        StorageError: the store refuses, or fails for too long.
        VerificationError: what came is not what was written.
    """
    parent, _, name = uri.rpartition("/")
    if version and _holds(path := _place(uri, version), version):
        return Near(path, version)
    objects = Storage(parent).objects()
    if version is None:
        found = objects.look(name)
        if found is None:
            raise FileNotFoundError(uri)
        version = Version.of(found)
    try:
        return Near(_fetch(objects, name, version, _place(uri, version)), version)
    except FileExistsError as error:
        raise ChangedError(f"{uri} is no longer what it was") from error
    except VerificationError as error:
        text = "what was read is not what was written (SHA-256); delete it there, and upload it again"
        raise VerificationError(f"{uri}: {text}") from error


def _place(uri: str, version: Version) -> Path:
    """Where a copy is kept: some thousand folders, each with few files and a lock."""
    protocol, _, rest = uri.partition("://")
    key = hashlib.sha256(f"{uri}\0{version}".encode()).hexdigest()[:40]
    suffix = PurePosixPath(uri).suffix
    return (
        copies_of(f"near {protocol}://{rest.partition('/')[0]}")
        / key[:3]
        / f"{key}{suffix if len(suffix) < 10 else ''}"
    )


def _holds(path: Path, version: Version) -> bool:
    try:
        there = path.stat().st_size == version.size
    except OSError:
        return False
    root = path.parent.parent
    if there and time.monotonic() - _touched.get(root, -_TOUCH_EVERY_S) >= _TOUCH_EVERY_S:
        _touched[root] = time.monotonic()
        with contextlib.suppress(OSError):
            os.utime(root)  # it is in use
    return there


def _fetch(objects: Objects, name: str, version: Version, path: Path) -> Path | bytes:
    with contextlib.ExitStack() as stack:
        roomy = _has_room(path, version, stack)
        if _holds(path, version):  # another thread or process was first
            return path
        try:
            if roomy and version.size > PART:
                _download(objects, name, version, path)
                return path
            content = _read(objects, name, version)
            if roomy:
                _write(path, content)
                return path
            return content
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            for left in path.parent.glob(f"{PRIVATE_PREFIX}{escape(path.name)}*"):
                left.unlink(missing_ok=True)
    return _read(objects, name, version)


def _has_room(path: Path, version: Version, stack: contextlib.ExitStack) -> bool:
    """Whether the disk may take a copy; its lock is then held: parts of one recording are asked for all at once."""
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            forget_unused()
        stack.enter_context(locked(path.parent / f"{PRIVATE_PREFIX}lock"))
        return shutil.disk_usage(path.parent).free - version.size > RESERVE
    except OSError:
        return False


def _download(objects: Objects, name: str, version: Version, path: Path) -> None:
    read = partial(objects.read, name, etag=version.etag)
    mark = version.sha256 or version.etag
    download(read, version.size, version.sha256, mark, path, Meter(version.size, None))


def _read(objects: Objects, name: str, version: Version) -> bytes:
    def piece(place: tuple[int, int]) -> bytes:
        return objects.read(name, *place, etag=version.etag)

    parts = pieces(version.size, PART)
    content = b"".join(in_parallel(piece, parts)) if len(parts) > 1 else objects.read(name, etag=version.etag)
    if len(content) != version.size or version.sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise VerificationError(name)
    return content


def _write(path: Path, content: bytes) -> None:
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f"{PRIVATE_PREFIX}{path.name}")
    with open(handle, "wb") as file:
        file.write(content)
    Path(aside).replace(path)
