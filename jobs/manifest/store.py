"""The clips of a build or a check, on disk: a million rows in flat memory, sorted and compared by SQLite."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tempfile
import unicodedata
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from jobs.manifest.examine import Sound
from jobs.manifest.row import Reject, Row
from jobs.manifest.rows import format_segments
from service.errors import StorageError

BATCH = 1_000
CACHE_KIB = 8_192

_TABLES = """
CREATE TABLE clips (
  id INTEGER PRIMARY KEY, source INTEGER, line INTEGER, name TEXT, path TEXT, text TEXT, language TEXT,
  start_s REAL, end_s REAL, duration_s REAL, segments TEXT, no_speech INTEGER, extras TEXT,
  text_key BLOB, audio_key BLOB, group_key BLOB, recording_key BLOB, alive INTEGER);
CREATE TABLE remarks (
  source INTEGER, line INTEGER, name TEXT, start_s REAL, kind TEXT, reason TEXT, warning INTEGER);
"""
_INSERT_CLIP = f"INSERT INTO clips VALUES (NULL{',?' * 16},1)"
_INSERT_REMARK = f"INSERT INTO remarks VALUES ({','.join('?' * 7)})"

KEYS = ("text_key", "audio_key", "group_key", "recording_key")
"""Hashes of what must not be on both sides of a split; empty where a clip has none."""


@dataclass(frozen=True)
class Clip:
    """A usable clip, as it is written."""

    id: int
    path: str
    text: str
    language: str
    duration_s: float
    start_s: float | None
    end_s: float | None
    segments: str
    no_speech: bool
    extras: dict[str, str]


@dataclass(frozen=True)
class Remark:
    """A row that is left out or pointed out, and why."""

    source: int
    line: int
    name: str
    kind: str
    reason: str


class Store:
    """Clips, rejects and warnings, in a file of its own that is deleted at the end.

    Args:
        group: column whose values must not be on both sides; None: there is none.

    Raises:
        StorageError: at the end of its context, where the disk of the temporary folder is full.
    """

    def __init__(self, group: str | None = None) -> None:
        self._group = group
        self._folder = tempfile.TemporaryDirectory(prefix="whisper-jobs-manifest-")
        self._db = sqlite3.connect(Path(self._folder.name) / "clips.sqlite", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", f"cache_size=-{CACHE_KIB}"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(_TABLES)
        self._db.execute("BEGIN")
        self._clips: list[tuple[Any, ...]] = []
        self._remarks: list[tuple[Any, ...]] = []
        self.columns: set[str] = set()
        """Optional and carried-along columns that some clip fills."""

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()
        self._folder.cleanup()
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            place = Path(self._folder.name).parent
            raise StorageError(f"{place}: the disk is full; make room, or set TMPDIR to another folder") from error

    # In.

    def add(self, row: Row, sound: Sound, source: int = 0) -> None:
        """Keep a usable clip."""
        segments = format_segments(row.segments)
        filled = {"start_s": row.start_s, "end_s": row.end_s, "segments": segments, "no_speech": row.no_speech}
        self.columns.update(name for name, value in filled.items() if value not in (None, "", False))
        self.columns.update(name for name, value in row.extras.items() if value)
        text = comparable(row.text)
        # A clip that was not decoded is known by its place.
        audio = sound.digest or digest(f"{row.path}\0{row.start_s}\0{row.end_s}")
        group = row.extras.get(self._group, "").strip() if self._group else ""
        recording = row.name if row.start_s is not None or row.end_s is not None else ""
        keys = (digest(text) if text else b"", audio, *(digest(key) if key else b"" for key in (group, recording)))
        times = (row.start_s, row.end_s, sound.duration_s, segments, int(row.no_speech))
        extras = json.dumps(row.extras, ensure_ascii=False) if row.extras else ""
        self._clips.append((source, row.line, row.name, row.path, row.text, row.language, *times, extras, *keys))
        if len(self._clips) >= BATCH:
            self._flush()

    def remark(self, row: Row, remark: Reject, source: int = 0, *, warning: bool = False) -> None:
        """Note why a row is left out, or what is odd about it."""
        self._note(source, row.line, row.name, row.start_s, remark, warning=warning)

    def _note(
        self, source: int, line: int, name: str, start_s: float | None, remark: Reject, *, warning: bool = False
    ) -> None:
        where = "" if start_s is None else f"at {start_s:.2f} s: "
        self._remarks.append(
            (source, line, printable(name), start_s, remark.kind, printable(where + remark.reason), int(warning))
        )
        if len(self._remarks) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        self._db.executemany(_INSERT_CLIP, self._clips)
        self._db.executemany(_INSERT_REMARK, self._remarks)
        self._clips.clear()
        self._remarks.clear()

    # Duplicates.

    def reject_duplicates(self) -> None:
        """Leave out clips whose audio another has too: all but the first where the texts agree, else all of them."""
        self._flush()
        twice = """SELECT audio_key, MIN(text_key) != MAX(text_key) AS conflict FROM clips
                   GROUP BY audio_key HAVING COUNT(*) > 1"""
        query = f"""SELECT audio_key, conflict, id, source, line, name, start_s FROM clips JOIN ({twice})
                    USING (audio_key) ORDER BY audio_key, source, name, start_s, id"""
        dropped = array("q")
        first: tuple[Any, ...] | None = None
        told = False
        for found in self._db.execute(query):
            if first is None or found[0] != first[0]:
                first, told = found, False
                continue
            if found[1] and not told:
                self._leave_out(first, found, dropped)
                told = True
            self._leave_out(found, first, dropped)
        self._flush()
        self._db.executemany("UPDATE clips SET alive = 0 WHERE id = ?", ((number,) for number in dropped))

    def _leave_out(self, found: tuple[Any, ...], twin: tuple[Any, ...], dropped: array[int]) -> None:
        _, conflict, number, source, line, name, start_s = found
        shown = f"line {twin[4]}, {twin[5]}" if twin[4] else str(twin[5])
        if twin[3] != source:
            shown = f"{shown}, of another file"
        if conflict:
            remark = Reject("conflict", f"has the same audio as {shown}, and their texts differ")
        else:
            remark = Reject("duplicate", f"has the same audio and text as {shown}")
        dropped.append(number)
        self._note(source, line, name, start_s, remark)

    # Out.

    def count(self, source: int | None = None) -> int:
        """Usable clips."""
        self._flush()
        where = "" if source is None else f"AND source = {source}"
        return int(self._db.execute(f"SELECT COUNT(*) FROM clips WHERE alive {where}").fetchone()[0])

    def clips(self) -> Iterator[Clip]:
        """Usable clips, sorted by source, name and place in the file."""
        self._flush()
        query = """SELECT id, path, text, language, duration_s, start_s, end_s, segments, no_speech, extras
                   FROM clips WHERE alive ORDER BY source, name, start_s, id"""
        for found in self._db.execute(query):
            *_, segments, no_speech, extras = found
            number, path, text, language, duration_s, start_s, end_s = found[:7]
            carried = json.loads(extras) if extras else {}
            yield Clip(number, path, text, language, duration_s, start_s, end_s, segments, bool(no_speech), carried)

    def remarks(self, *, warnings: bool = False) -> Iterator[Remark]:
        """Rejects, or warnings, sorted by source, line, name and place in the file."""
        self._flush()
        query = """SELECT source, line, name, kind, reason FROM remarks WHERE warning = ?
                   ORDER BY source, line, name, start_s, kind, reason"""
        return (Remark(*found) for found in self._db.execute(query, (int(warnings),)))

    def kinds(self, *, warnings: bool = False, source: int | None = None) -> dict[str, int]:
        """How many remarks there are, by kind."""
        self._flush()
        where = "" if source is None else f"AND source = {source}"
        query = f"SELECT kind, COUNT(*) FROM remarks WHERE warning = ? {where} GROUP BY kind ORDER BY kind"
        return dict(self._db.execute(query, (int(warnings),)).fetchall())

    def last_id(self) -> int:
        """Ids run from 1 to this."""
        self._flush()
        return int(self._db.execute("SELECT COALESCE(MAX(id), 0) FROM clips").fetchone()[0])

    def shared(self, key: str) -> Iterator[tuple[bytes, int]]:
        """(hash, id) of the usable clips that share a hash with another one, hash by hash; `key` is one of KEYS."""
        self._flush()
        twice = f"SELECT {key} FROM clips WHERE alive AND {key} != x'' GROUP BY {key} HAVING COUNT(*) > 1"
        return iter(self._db.execute(f"SELECT {key}, id FROM clips WHERE alive AND {key} IN ({twice}) ORDER BY {key}"))

    def places(self) -> Iterator[tuple[int, str, bytes, bytes, bytes, bytes]]:
        """(id, text, and the hashes of KEYS) of the usable clips, for the split."""
        self._flush()
        return iter(self._db.execute(f"SELECT id, text, {', '.join(KEYS)} FROM clips WHERE alive ORDER BY id"))

    def overlap(self, key: str) -> int:
        """How many values of a key (one of KEYS) are in more than one source."""
        self._flush()
        query = f"""SELECT COUNT(*) FROM (SELECT {key} FROM clips WHERE alive AND {key} != x''
                    GROUP BY {key} HAVING COUNT(DISTINCT source) > 1)"""
        return int(self._db.execute(query).fetchone()[0])


def comparable(text: str) -> str:
    """A transcript as it is compared with others: no case, no punctuation, one space between words."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in folded).split()
    return " ".join(words) or " ".join(folded.split())


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def printable(text: str) -> str:
    """A text that can be written as UTF-8: what is none (a name in another encoding) is shown by its bytes, `\\xe9`."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file's name gives
        return text.encode(errors="backslashreplace").decode()
