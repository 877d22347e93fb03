"""The first stage: every row of both manifests checked before a model is loaded, then stored as memory-mapped Arrow."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.audio import MAX_DURATION_S, probe
from jobs.manifest.rows import Row, read_rows
from jobs.model import load_prompter, quiet_libraries
from jobs.tokens import Prompter
from service.artifacts import DATA, REJECTS
from service.errors import Fault, ManifestError
from service.spec.job import JobSpec
from service.storage import Storage

SHOWN_FAULTS = 100
BLOCK = 1_000

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("text", pa.string()),
        ("language", pa.string()),
        ("duration_s", pa.float32()),
        ("tokens", pa.int32()),
    ]
)

Progress = Callable[[str, int], None]


@dataclass
class Split:
    """What is known of one split after its check."""

    name: str
    source: str
    rows: int = 0
    seconds: float = 0.0
    languages: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    rejects: list[tuple[str, str]] = field(default_factory=list)
    sentences: set[bytes] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)

    def as_dict(self) -> dict[str, Any]:
        """The split's entry in manifest.json."""
        return {
            "source": self.source,
            "rows": self.rows,
            "hours": round(self.seconds / 3600, 4),
            "languages": dict(sorted(self.languages.items())),
            "rejected": len(self.rejects),
            "sha256": self.digest.hexdigest(),
        }


def split_file(name: str) -> str:
    """Where a split's rows stand below the root."""
    return f"{DATA}/{name}.arrow"


def prepare(
    spec: JobSpec, root: str, splits: dict[str, str], model: str, progress: Progress = lambda split, rows: None
) -> dict[str, Any]:
    """Check the rows of all splits and store them.

    Args:
        spec: the job; `data.bad_rows` says what happens to rows that cannot be used.
        root: the run's root.
        splits: CSV by split name.
        model: checkpoint whose tokenizer counts the tokens.
        progress: called with (split, rows so far).

    Returns:
        per split: rows, hours, languages, rejected, and a hash over each row's path, text, language, frames and rate.

    Raises:
        ManifestError: rows cannot be used (all of them are named), or a split is empty.
        SpecError: the model's tokenizer cannot be had.
    """
    quiet_libraries()
    storage = Storage(root)
    prompter = load_prompter(model)
    found = []
    for name, source in splits.items():
        split = Split(name, source)
        target = storage.local(split_file(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".wj-{target.name}")
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
            for block in _blocks(_check_rows(split, prompter, spec), BLOCK):
                writer.write_batch(pa.RecordBatch.from_pylist(block, schema=SCHEMA))
                progress(name, split.rows)
        aside.replace(target)
        found.append(split)
    _settle(found, storage, reject=spec.data.bad_rows == "reject")
    both = set.intersection(*(split.sentences for split in found)) if len(found) > 1 else set()
    return {split.name: split.as_dict() for split in found} | {"sentences_in_both": len(both)}


def _check_rows(split: Split, prompter: Prompter, spec: JobSpec) -> Iterator[dict[str, Any]]:
    rows = read_rows(split.source, spec.training.language)
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        # In blocks: map() over a million rows would hold them all.
        for block in _blocks(rows, BLOCK):
            for row, outcome in zip(block, pool.map(lambda row: _check(row, prompter), block), strict=True):
                if isinstance(outcome, str):
                    shown = [row.path] if row.path else []
                    split.faults.append(Fault(f"{split.source}, line {row.line}", outcome, *shown))
                    split.rejects.append((row.path, outcome))
                    continue
                duration_s, tokens, identity = outcome
                split.rows += 1
                split.seconds += duration_s
                split.languages[row.language] += 1
                split.sentences.add(hashlib.sha256(row.text.casefold().encode()).digest()[:8])
                split.digest.update(json.dumps(identity, ensure_ascii=False).encode())
                yield {
                    "path": row.path,
                    "text": row.text,
                    "language": row.language,
                    "duration_s": duration_s,
                    "tokens": tokens,
                }


def _check(row: Row, prompter: Prompter) -> str | tuple[float, int, list[Any]]:
    """What is wrong with a row, or its duration in seconds, its label tokens, and what identifies it."""
    if row.surplus:
        return f"has more fields than the header, by {row.surplus}; put a text with commas in double quotes"
    if not row.path:
        return "path is empty"
    if not row.text:
        return "text is empty"
    if not prompter.knows_language(row.language):
        hint = "" if prompter.multilingual else "; an English-only (.en) checkpoint takes en alone"
        return f"language {row.language!r} is unknown to the model{hint}"
    if control := prompter.control_token(row.text):
        return f"text holds {control}, which the model takes for a command; take it out"
    tokens = len(prompter.encode(row.text, row.language).inputs)
    if tokens > prompter.max_tokens:
        return f"text is {tokens} tokens long; the decoder takes {prompter.max_tokens}"
    try:
        info = probe(row.path)
    except ManifestError as error:
        return error.faults[0].message
    if info.frames == 0:
        return "holds no sound (0 frames)"
    if info.duration_s > MAX_DURATION_S:
        return f"{info.duration_s:.1f} s long; at most {MAX_DURATION_S:.0f} s, so that nothing is cut off: split it"
    identity = [Path(row.path).name, row.text, row.language, info.frames, info.sample_rate_hz, info.channels]
    return info.duration_s, tokens, identity


def _settle(splits: list[Split], storage: Storage, *, reject: bool) -> None:
    """Refuse bad rows or leave them out, as the spec says; refuse empty splits in any case."""
    faults = [fault for split in splits for fault in split.faults]
    if faults and not reject:
        shown = faults[:SHOWN_FAULTS]
        if len(faults) > len(shown):
            shown.append(Fault("...", f"and {len(faults) - len(shown)} more rows"))
        way_out = (
            "mend the rows, or leave them out with --set data.bad_rows=reject (they are then listed in rejects.csv)"
        )
        raise ManifestError([*shown, Fault(f"{len(faults)} rows cannot be used", way_out)])
    empty = [Fault(split.source, "has no usable row") for split in splits if not split.rows]
    if empty:
        raise ManifestError([*faults[:SHOWN_FAULTS], *empty])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("split", "path", "reason"))
    writer.writerows((split.name, path, reason) for split in splits for path, reason in split.rejects)
    storage.write_text(REJECTS, text.getvalue())


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block
