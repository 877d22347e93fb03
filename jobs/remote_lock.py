"""One run at a time under a root on object storage: an object that its holder renews, and that others may take over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from service.errors import StorageError
from service.storage import LOCK, Storage

RENEW_S = 20.0
"""How often the holder shows that it lives."""

STALE_S = 90.0
"""A lock that has not been renewed for so long may be taken over."""

_LOOK_EVERY_S = 2.0


class HeldError(Exception):
    """Another run holds the root; says who."""


@dataclass(frozen=True)
class Held:
    """A lock as it is found."""

    etag: str
    holder: dict[str, Any]
    age_s: float


@contextlib.contextmanager
def held(root: Storage, tell: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold a remote root until this ends.

    A holder that was killed cannot give it back. On the same machine that is seen at once; elsewhere a lock that is
    not renewed is waited for until it is stale.

    Args:
        root: on object storage.
        tell: takes a line for whoever watches.

    Yields:
        a function that raises StorageError where another run has taken the root over.

    Raises:
        HeldError: another run holds it and lives.
    """
    lock = _Lock(root)
    lock.take(tell)
    stop, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not stop.wait(RENEW_S):
            try:
                lock.write(instead_of=lock.etag)
            except (FileExistsError, FileNotFoundError):
                lost.set()
                return
            except StorageError:
                continue  # the job itself ends on it where it writes what it needs

    def check() -> None:
        if lost.is_set():
            raise StorageError(f"{root.path()}: another run has taken this root over; this one ends")

    thread = threading.Thread(target=renew, daemon=True, name="lock")
    thread.start()
    try:
        yield check
    finally:
        stop.set()
        thread.join()
        if not lost.is_set():
            with contextlib.suppress(StorageError):
                lock.give_back()


class _Lock:
    """This run's side of the lock."""

    def __init__(self, root: Storage) -> None:
        self._objects = root.objects()
        self._me = _identity() | {"token": secrets.token_hex(8)}
        self.etag = ""

    def write(self, *, instead_of: str = "") -> None:
        """Put the lock down: as a new one, or in place of the one with that etag."""
        content = json.dumps(self._me | {"renewed": datetime.now(UTC).isoformat()}).encode()
        digest = hashlib.sha256(content).hexdigest()
        self.etag = self._objects.put(LOCK, content, digest, only_new=not instead_of, instead_of=instead_of)

    def take(self, tell: Callable[[str], None]) -> None:
        """Take the lock: where there is none, or where its holder has ended."""
        told = ""
        while True:
            present = self._look()
            try:
                if present is None:
                    return self.write()
                if _has_ended(present.holder) or present.age_s >= STALE_S:
                    return self.write(instead_of=present.etag)
            except (FileExistsError, FileNotFoundError):
                continue  # another one was faster
            if _is_here(present.holder) or (told and present.etag != told):
                raise HeldError(_named(present.holder))
            if not told:
                told = present.etag
                tell(f"another run may be at work here{_named(present.holder)}; waiting whether it shows that it lives")
            time.sleep(_LOOK_EVERY_S)

    def give_back(self) -> None:
        """Delete the lock, where it is still ours."""
        present = self._look()
        if present and present.holder.get("token") == self._me["token"]:
            self._objects.remove([LOCK])

    def _look(self) -> Held | None:
        found = self._objects.look(LOCK)
        if found is None:
            return None
        try:
            holder = dict(json.loads(self._objects.read(LOCK, etag=found.etag)))
        except (FileNotFoundError, FileExistsError):
            return self._look()
        except (ValueError, TypeError):
            holder = {}
        age_s = found.age_s
        if age_s is None:
            renewed = holder.get("renewed")
            age_s = (datetime.now(UTC) - datetime.fromisoformat(renewed)).total_seconds() if renewed else STALE_S
        return Held(found.etag, holder, age_s)


def _identity() -> dict[str, Any]:
    """Who this process is, so that others on this machine can tell whether it still lives."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "system": _system(), "began": _began()}


def _system() -> str:
    """Tells one boot and one space of process numbers from another; a container has its own."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    return ""


def _began(pid: int | str = "self") -> str:
    """When a process began, in the system's ticks; "": it has ended."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder's process numbers are ours."""
    return bool(_system()) and (holder.get("host"), holder.get("system")) == (socket.gethostname(), _system())


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has gone."""
    return _is_here(holder) and _began(holder.get("pid", 0)) != holder.get("began")


def _named(holder: dict[str, Any]) -> str:
    if not {"pid", "host", "since"} <= holder.keys():
        return ""
    return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
