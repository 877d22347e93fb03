"""Bytes between this machine and a store: pieces in parallel, downloads that go on where they were cut off."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import escape
from pathlib import Path
from typing import TypeVar

from service.errors import VerificationError
from service.storage.names import PRIVATE_PREFIX, Progress, sha256_of
from service.storage.objects import PART

Item = TypeVar("Item")
Result = TypeVar("Result")

AT_ONCE = 4
"""Files at a time, and pieces of each file at a time."""

_REPORT_EVERY_S = 0.5


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call a function with each item, some at a time; the first error ends it."""
    if len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        calls = [pool.submit(function, item) for item in items]
        try:
            return [call.result() for call in calls]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def pieces(size: int, length: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of so many bytes; an empty file is one empty piece."""
    return [(start, min(length, size - start)) for start in range(0, max(size, 1), length)]


class Meter:
    """Counts the bytes of several transfers, and tells now and then.

    Args:
        total: bytes in all.
        tell: takes (done, total).
    """

    def __init__(self, total: int, tell: Progress | None) -> None:
        self._total, self._tell, self._done = total, tell, 0
        self._told = 0.0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Count bytes that are done."""
        with self._lock:
            self._done = min(self._done + count, self._total)
            now = time.monotonic()
            if self._tell and (self._done >= self._total or now - self._told >= _REPORT_EVERY_S):
                self._told = now
                self._tell(self._done, self._total)


def hash_of(read: Callable[[int, int], bytes], size: int) -> str:
    """SHA-256 of something that is read in pieces, some of them at a time.

    Args:
        read: gives the piece at (start, length).
        size: bytes in all.
    """
    digest = hashlib.sha256()
    for group in _groups(pieces(size, PART)):
        for content in in_parallel(lambda piece: read(*piece), group):
            digest.update(content)
    return digest.hexdigest()


def download(
    read: Callable[[int, int], bytes], size: int, sha256: str | None, mark: str, target: Path, meter: Meter
) -> None:
    """Have a file on this machine: read aside, checked, renamed. What an earlier call had read is not read again.

    Args:
        read: gives the piece at (start, length).
        size: bytes in all.
        sha256: what they must be; None: not known.
        mark: tells this content from another: pieces are joined only with pieces of the same mark.
        target: the file.
        meter: counts.

    Raises:
        VerificationError: what came is something else, read anew too.
    """
    identity = hashlib.sha256(f"{size} {mark} {PART}".encode()).hexdigest()[:12]
    part = target.with_name(f"{PRIVATE_PREFIX}{target.name}.{identity}")
    journal = part.with_name(f"{part.name}.done")
    target.parent.mkdir(parents=True, exist_ok=True)
    for fresh in (not part.exists(), True):
        if fresh:
            journal.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        _read_pieces(read, size, part, journal, meter)
        if part.stat().st_size == size and (sha256 is None or sha256_of(part) == sha256):
            part.replace(target)
            for left in target.parent.glob(f"{PRIVATE_PREFIX}{escape(target.name)}.*"):
                left.unlink()
            return
    journal.unlink()
    part.unlink()
    raise VerificationError(f"{target.name}: what was read is not what was written (SHA-256)")


def _read_pieces(read: Callable[[int, int], bytes], size: int, part: Path, journal: Path, meter: Meter) -> None:
    """Fill a file, leaving out the pieces that a journal beside it says are there."""
    # A line that a kill has cut off may look like another piece.
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    there = {line.strip() for line in lines if line.endswith("\n")}
    lock = threading.Lock()
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file, open(journal, "a") as log:
        os.ftruncate(file.fileno(), size)

        def fill(piece: tuple[int, int]) -> None:
            start, count = piece
            if str(start) not in there:
                content = read(start, count)
                if len(content) != count:
                    raise VerificationError(f"{part.name}: {len(content)} bytes at {start}, {count} expected")
                write_at(file.fileno(), content, start)
                with lock:
                    log.write(f"{start}\n")
                    log.flush()
            meter.advance(count)

        in_parallel(fill, pieces(size, PART))


def write_at(handle: int, content: bytes | memoryview, start: int) -> None:
    """Write all: a disk that becomes full takes a part without an error, and refuses only what comes after it."""
    rest = memoryview(content)
    while rest:
        count = os.pwrite(handle, rest, start)
        rest, start = rest[count:], start + count


def _groups(items: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """So many at a time as are held in memory."""
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]
