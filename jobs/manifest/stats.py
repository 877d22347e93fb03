"""`manifest stats`: what is in manifests: hours, lengths, languages, speakers, vocabulary."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jobs.audio import MAX_DURATION_S, probe
from jobs.manifest.columns import require_manifests
from jobs.manifest.row import Row, speaker_of
from jobs.manifest.rows import read_rows
from jobs.manifest.store import comparable
from service.errors import ManifestError
from service.spec.languages import WITHOUT_SPACES
from service.spec.manifests import LANGUAGE

BIN_S = 0.01
"""Lengths are counted in bins: percentiles of a million clips take no more memory than those of ten."""

PERCENTILES = (5, 25, 50, 75, 95)
SHOWN = 10


class Collector:
    """Counts rows as they come."""

    def __init__(self, speaker: str | None = None) -> None:
        self._speaker = speaker
        self._bins = array("q", [0]) * (round(MAX_DURATION_S / BIN_S) + 2)
        self._seconds = self._shortest = self._longest = 0.0
        self._languages: dict[str, list[float]] = {}
        self._speakers: dict[str, list[float]] = {}
        self._words: Counter[str] = Counter()
        self._characters: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def add(self, row: Row, duration_s: float | None) -> None:
        """Count one row; duration None: not known."""
        self._counts["clips"] += 1
        self._counts["no_speech"] += row.no_speech
        self._counts["with_segments"] += bool(row.segments)
        self._counts["segments"] += len(row.segments)
        seconds = duration_s or 0.0
        if duration_s is None:
            self._counts["of_unknown_length"] += 1
        else:
            known = self._counts["clips"] - self._counts["of_unknown_length"]
            self._shortest = seconds if known == 1 else min(self._shortest, seconds)
            self._longest = max(self._longest, seconds)
            self._seconds += seconds
            self._bins[min(len(self._bins) - 1, round(seconds / BIN_S))] += 1
        _add(self._languages, row.language, seconds)
        if speaker := row.extras.get(self._speaker, "") if self._speaker else speaker_of(row):
            _add(self._speakers, speaker, seconds)
        words = comparable(row.text).split()
        if row.language in WITHOUT_SPACES:
            words = [character for word in words for character in word]
        self._words.update(words)
        self._characters.update(row.text)

    def as_dict(self) -> dict[str, Any]:
        """What was counted, as JSON."""
        clips = self._counts["clips"]
        known = clips - self._counts["of_unknown_length"]
        spoken = sum(self._words.values())
        return {
            "clips": clips,
            "hours": round(self._seconds / 3600, 4),
            **{name: self._counts[name] for name in ("no_speech", "with_segments", "segments", "of_unknown_length")},
            "length_s": {
                "mean": round(self._seconds / known, 3) if known else 0.0,
                "min": round(self._shortest, 3),
                "max": round(self._longest, 3),
            }
            | {f"p{share}": self._percentile(share, known) for share in PERCENTILES},
            "languages": _table(self._languages),
            "speakers": {"count": len(self._speakers), "most": _table(self._speakers, SHOWN)},
            "vocabulary": {
                "words": spoken,
                "different": len(self._words),
                "once": sum(count == 1 for count in self._words.values()),
                "words_per_clip": round(spoken / clips, 2) if clips else 0.0,
                "words_per_s": round(spoken / self._seconds, 2) if self._seconds else 0.0,
                "characters": "".join(sorted(self._characters))[:500],
                "most": _most(self._words),
            },
        }

    def _percentile(self, share: int, known: int) -> float:
        wanted, seen = share / 100 * known, 0
        for index, count in enumerate(self._bins):
            seen += count
            if seen >= wanted and seen:
                return round(index * BIN_S, 2)
        return 0.0


def stats(
    sources: Sequence[str],
    *,
    language: str = LANGUAGE,
    speaker: str | None = None,
    progress: Callable[[str, int], None] = lambda source, done: None,
) -> dict[str, Any]:
    """Statistics of CSVs, of each and of all.

    Args:
        sources: paths or URIs.
        language: of rows that name none.
        speaker: column that names speakers; None: the first of SPEAKER_COLUMNS that a row fills.
        progress: called with (CSV, rows done).

    Returns:
        {"csvs": {path: statistics}, "total": statistics}. Lengths are taken from duration_s or start_s and end_s, else
        from the audio's header.

    Raises:
        ManifestError: a CSV cannot be read, has no row or lacks a column; faults of all CSVs.
    """
    speaker = speaker.strip().lower() if speaker else None
    require_manifests(sources, language, "--speaker", speaker)
    total = Collector(speaker)
    parts = {}
    for source in sources:
        part = Collector(speaker)
        for done, row in enumerate(read_rows(source, language), 1):
            seconds = _duration_s(row)
            part.add(row, seconds)
            total.add(row, seconds)
            if done % 1000 == 0:
                progress(source, done)
        parts[source] = part.as_dict()
    return {"csvs": parts, "total": total.as_dict()}


def _duration_s(row: Row) -> float | None:
    if row.end_s is not None:
        return row.end_s - (row.start_s or 0.0)
    if row.duration_s is not None:
        return row.duration_s
    try:
        return probe(row.path).duration_s - (row.start_s or 0.0)
    except ManifestError:
        return None


def _add(table: dict[str, list[float]], name: str, seconds: float) -> None:
    entry = table.setdefault(name, [0, 0.0])
    entry[0] += 1
    entry[1] += seconds


def _table(counted: dict[str, list[float]], most: int | None = None) -> dict[str, Any]:
    ordered = sorted(counted.items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))[:most]
    return {name: {"clips": int(clips), "hours": round(seconds / 3600, 4)} for name, (clips, seconds) in ordered}


def _most(words: Counter[str]) -> dict[str, int]:
    return dict(sorted(words.items(), key=lambda item: (-item[1], item[0]))[:SHOWN])
