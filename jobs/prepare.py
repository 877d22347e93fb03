"""The first stage: every row of both manifests checked before a model is loaded, then stored as memory-mapped Arrow."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.audio import MAX_DURATION_S
from jobs.manifest.examine import Limits, Sound, examine
from jobs.manifest.row import Reject, Row, Segment, speaker_of
from jobs.manifest.rows import format_segments, read_rows
from jobs.manifest.store import printable
from jobs.manifest.transcript import joined_reason, text_faults
from jobs.model import load_prompter, quiet_libraries
from jobs.text import TextNormaliser
from jobs.tokens import Prompter
from service.artifacts import DATA, DATASET, REJECTS
from service.errors import Fault, ManifestError
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.paths import is_uri
from service.storage import Storage

SHOWN_FAULTS = 100
LENGTH_BIN_S = 0.5
"""Width of the bins in which clips are counted by their length; the last one, from 30 s on, is open."""

BLOCK = 1_000

ANY_LENGTH = ("guard",)
"""Splits whose clips may be longer than a window: they are not trained on, and are transcribed window by window."""

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("duration_s", pa.float32()),
        ("tokens", pa.int32()),
        # Of a clip inside a longer file; null: from its begin, to its end.
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
        # JSON of [start_s, end_s, text] from the clip's begin; empty: none.
        ("segments", pa.string()),
        ("no_speech", pa.bool_()),
        # Of a clip in object storage: the content that was checked, and that is read from now on.
        ("version", pa.string()),
        # As the manifest names them; empty: it does not.
        ("speaker", pa.string()),
    ]
)

Progress = Callable[[str, int], None]


@dataclass
class Split:
    """What is known of one split after its check. Nothing here grows with its rows but 16 bytes of each."""

    name: str
    source: str
    rows: int = 0
    seconds: float = 0.0
    languages: Counter[str] = field(default_factory=Counter)
    language_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lengths: Counter[int] = field(default_factory=Counter)
    """Clips by bin of LENGTH_BIN_S."""
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    longest: int = 0
    """Most tokens in a row, its prompt counted."""
    sentences: array[int] = field(default_factory=lambda: array("Q"))
    clips: array[int] = field(default_factory=lambda: array("Q"))
    """By their samples or, where those were not looked at, by their place."""
    digest: Any = field(default_factory=hashlib.sha256)

    def as_dict(self) -> dict[str, Any]:
        """The split's entry in manifest.json."""
        return {
            "source": self.source,
            "rows": self.rows,
            "hours": round(self.seconds / 3600, 4),
            "languages": dict(sorted(self.languages.items())),
            "language_hours": {code: round(s / 3600, 4) for code, s in sorted(self.language_seconds.items())},
            "lengths": {
                "bin_s": LENGTH_BIN_S,
                "clips": [self.lengths[index] for index in range(max(self.lengths, default=-1) + 1)],
            },
            "longest_tokens": self.longest,
            "rejected": self.rejected,
            "reasons": dict(sorted(self.reasons.items())),
            "sha256": self.digest.hexdigest(),
        }


def split_file(name: str) -> str:
    """Where a split's rows stand below the root."""
    return f"{DATA}/{name}.arrow"


def fetch_rows(storage: Storage, name: str) -> str:
    """A split's rows as a file of this machine; what the job took from a dataset's tables is brought here with it.

    Raises:
        NotFoundError: there are none.
    """
    if not storage.is_local and storage.exists(DATASET):
        storage.fetch(DATASET)  # where the rows' paths lead to
    return str(storage.fetch(split_file(name)))


def prepare(
    spec: JobSpec, root: str, splits: dict[str, str], model: str, progress: Progress = lambda split, rows: None
) -> dict[str, Any]:
    """Check the rows of all splits and store them.

    Args:
        spec: the job; `data.bad_rows` says what happens to rows that cannot be used.
        root: the run's root.
        splits: CSV by split name: first those whose sentences are compared, train and val.
        model: checkpoint whose tokenizer counts the tokens.
        progress: called with (split, rows so far).

    Returns:
        per split: rows, hours, languages, rejected, and a hash over each row's path, text, language, frames, rate
        and whatever else it has; and how many sentences and clips of the first two splits are in both.

    Raises:
        ManifestError: rows cannot be used (all of them are named), or a split is empty.
        SpecError: the model's tokenizer cannot be had.
    """
    quiet_libraries()
    storage = Storage(root)
    prompter = load_prompter(model)
    found = []
    with storage.new_file(REJECTS) as rejects:
        with open(rejects, "w", encoding="utf-8", newline="") as file:
            left_out = csv.writer(file, lineterminator="\n")
            left_out.writerow(("split", "path", "kind", "reason"))
            for name, source in splits.items():
                split = Split(name, source)
                _store(split, storage, _check_rows(split, prompter, spec, left_out), progress)
                found.append(split)
        _settle(found, reject=spec.data.bad_rows == "reject")
    return {split.name: split.as_dict() for split in found} | {
        "sentences_in_both": _in_both([split.sentences for split in found]),
        "clips_in_both": _in_both([split.clips for split in found]),
    }


def _in_both(keys: list[array[int]]) -> int:
    """How many different ones the first two have in common."""
    if len(keys) < 2:
        return 0
    one, other = (np.frombuffer(each, np.uint64) for each in keys[:2])
    return len(np.intersect1d(one, other))


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def _store(split: Split, storage: Storage, records: Iterator[dict[str, Any]], progress: Progress) -> None:
    with ExitStack() as stack:
        path = stack.enter_context(storage.new_file(split_file(split.name)))
        file = stack.enter_context(pa.OSFile(str(path), "wb"))
        writer = stack.enter_context(pa.ipc.new_stream(file, SCHEMA))
        for block in _blocks(records, BLOCK):
            writer.write_batch(pa.RecordBatch.from_pylist(block, schema=SCHEMA))
            progress(split.name, split.rows)


def _check_rows(split: Split, prompter: Prompter, spec: JobSpec, left_out: Any) -> Iterator[dict[str, Any]]:
    rows = read_rows(split.source, spec.training.language)
    any_length = split.name in ANY_LENGTH
    limits = Limits.of(spec.data, max_s=math.inf if any_length else MAX_DURATION_S)
    rules = TextNormaliser(spec.data.text)
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        # In blocks: map() over a million rows would hold them all.
        for block in _blocks(rows, BLOCK):
            for verdicts in pool.map(lambda row: examine(row, limits), block):
                for claimed, found in verdicts:
                    row = _ruled(claimed, rules)
                    faults = [found] if isinstance(found, Reject) else []
                    faults += text_faults(row, prompter, any_length=any_length) if row.fault is None else []
                    if faults or not isinstance(found, Sound):
                        _reject(split, row, joined_reason(faults), left_out)
                    else:
                        yield _accept(split, row, found, prompter.count(row))


def _ruled(row: Row, rules: TextNormaliser) -> Row:
    """The row with its texts in the form that the spec asks for."""
    segments = tuple(replace(segment, text=rules(segment.text)) for segment in row.segments)
    return replace(row, text=rules(row.text), segments=tuple(segment for segment in segments if segment.text))


def _accept(split: Split, row: Row, sound: Sound, tokens: int) -> dict[str, Any]:
    split.rows += 1
    split.longest = max(split.longest, tokens)
    split.seconds += sound.duration_s
    split.languages[row.language] += 1
    split.language_seconds[row.language] += sound.duration_s
    split.lengths[int(min(sound.duration_s, MAX_DURATION_S) / LENGTH_BIN_S)] += 1
    if row.text:
        split.sentences.append(_key(row.text.casefold().encode()))
        place = row.path if is_uri(row.path) else os.path.realpath(row.path)
        split.clips.append(_key(sound.digest or f"{place} {row.start_s} {row.end_s}".encode()))
    identity = [Path(row.path).name, row.text, row.language, sound.frames, sound.sample_rate_hz, sound.channels]
    speaker = speaker_of(row)
    if row.start_s is not None or row.segments or row.no_speech or speaker:
        identity += [row.start_s, format_segments(row.segments), row.no_speech]
    if speaker:
        identity.append(speaker)
    split.digest.update(json.dumps(identity, ensure_ascii=False).encode())
    begin = row.start_s or 0.0
    segments = tuple(Segment(s.start_s - begin, s.end_s - begin, s.text) for s in row.segments)
    return {
        "path": row.path,
        "text": row.text,
        "language": row.language,
        "duration_s": sound.duration_s,
        "tokens": tokens,
        "start_s": row.start_s,
        "end_s": row.end_s,
        "segments": format_segments(segments),
        "no_speech": row.no_speech,
        "version": sound.version,
        "speaker": speaker,
    }


def _reject(split: Split, row: Row, reason: Reject, left_out: Any) -> None:
    split.rejected += 1
    split.reasons[reason.kind] += 1
    if len(split.faults) < SHOWN_FAULTS:
        shown = [row.path] if row.path else []
        split.faults.append(Fault(f"{split.source}, line {row.line}", reason.reason, *shown))
    left_out.writerow((split.name, printable(row.path), reason.kind, printable(reason.reason)))


def _settle(splits: list[Split], *, reject: bool) -> None:
    """Refuse bad rows or leave them out, as the spec says; refuse empty splits in any case."""
    shown = [fault for split in splits for fault in split.faults][:SHOWN_FAULTS]
    count = sum(split.rejected for split in splits)
    if count and not reject:
        if count > len(shown):
            shown.append(Fault("...", f"and {counted(count - len(shown), 'more row')}"))
        way_out = (
            "mend the rows, or leave them out with --set data.bad_rows=reject (they are then listed in rejects.csv)"
        )
        raise ManifestError([*shown, Fault(f"{counted(count, 'row')} cannot be used", way_out)])
    empty = [Fault(split.source, "has no usable row") for split in splits if not split.rows]
    if empty:
        raise ManifestError([*shown, *empty])


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
