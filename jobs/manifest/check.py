"""`manifest check`: CSVs made elsewhere, all of their faults in one run."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.manifest.columns import require_manifests
from jobs.manifest.examine import Limits
from jobs.manifest.examine_all import examine_all
from jobs.manifest.parallel import usable_cpus
from jobs.manifest.place import require_rejects_place
from jobs.manifest.rows import read_rows
from jobs.manifest.split import SHARED
from jobs.manifest.store import Remark, Store
from jobs.manifest.write import written_aside
from service.errors import Fault, ManifestError, StorageError
from service.spec.manifests import LANGUAGE
from service.spec.sections import DataConfig
from service.writing import writing

if TYPE_CHECKING:
    from jobs.tokens import Prompter

SHOWN = 100
"""Faults in the report; all of them go to the file that a user asks for."""


def check(
    sources: Sequence[str],
    *,
    language: str = LANGUAGE,
    limits: Limits | None = None,
    prompter: Prompter | None = None,
    group: str | None = None,
    keep_duplicates: bool = False,
    processes: int | None = None,
    rejects: Path | None = None,
    progress: Callable[[str, int], None] = lambda source, done: None,
) -> dict[str, Any]:
    """Look at every row of every CSV.

    Args:
        sources: paths or URIs of the CSVs.
        language: of rows that name none.
        limits: what clips must keep to; None: the defaults of a spec's `data`.
        prompter: tokenizer of the checkpoint; None: tokens are not counted.
        group: column of whose values none may be in two of the CSVs.
        keep_duplicates: pass over clips with the same audio.
        processes: that decode; None: one per CPU.
        rejects: CSV to write every fault to, none of the sources.
        progress: called with (CSV, rows done).

    Returns:
        {"ok", "csvs": [{"csv", "rows", "usable", "reasons", "warnings"}], "overlap": values in more than one CSV by
        what they are, "faults" and "warnings": the first ones of each as {"csv", "line", "path", "kind", "reason"}}.

    Raises:
        InputError: an argument is unusable.
        ManifestError: a CSV cannot be read at all, has no row or lacks a column; faults of all CSVs.
        StorageError: the faults cannot be written.
    """
    if rejects is not None:
        require_rejects_place(rejects, sources)
    group = group.strip().lower() if group else None
    require_manifests(sources, language, "--group", group)
    unreadable: list[Fault] = []
    rows = [0] * len(sources)
    with Store(group) as store:
        for number, source in enumerate(sources):
            try:
                rows[number] = examine_all(
                    read_rows(source, language, strict=False),
                    store,
                    limits or Limits.of(DataConfig(), decode=True),
                    prompter,
                    processes=processes or usable_cpus(),
                    source=number,
                    progress=lambda done, source=source: progress(source, done),  # type: ignore[misc]
                )
            except ManifestError as error:
                unreadable += error.faults
            except StorageError as error:
                unreadable.append(Fault(source, f"names clips in a store that cannot be used: {error}"))
        if unreadable:
            raise ManifestError(unreadable)
        overlap = {SHARED[key]: store.overlap(key) for key in SHARED if group or key != "group_key"}
        if not keep_duplicates:
            store.reject_duplicates()
        if rejects is not None:
            _write(rejects, store, sources)
        reports = [
            {
                "csv": source,
                "rows": rows[number],
                "usable": store.count(number),
                "reasons": store.kinds(source=number),
                "warnings": store.kinds(source=number, warnings=True),
            }
            for number, source in enumerate(sources)
        ]
        return {
            "ok": not any(report["reasons"] for report in reports) and not any(overlap.values()),
            "csvs": reports,
            "overlap": overlap,
            "faults": [_plain(remark, sources) for remark in islice(store.remarks(), SHOWN)],
            "warnings": [_plain(remark, sources) for remark in islice(store.remarks(warnings=True), SHOWN)],
        }


def _plain(remark: Remark, sources: Sequence[str]) -> dict[str, Any]:
    return {
        "csv": sources[remark.source],
        "line": remark.line,
        "path": remark.name,
        "kind": remark.kind,
        "reason": remark.reason,
    }


def _write(path: Path, store: Store, sources: Sequence[str]) -> None:
    with writing(path, "give another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path.resolve()) as file:
            writer = csv.DictWriter(file, ("csv", "line", "path", "kind", "reason"), lineterminator="\n")
            writer.writeheader()
            writer.writerows(_plain(remark, sources) for remark in store.remarks())
