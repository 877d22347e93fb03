"""Rows in, usable clips and remarks out: audio is looked at in parallel processes, text here with one tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from jobs.manifest.examine import Limits, Sound, Verdict, examine
from jobs.manifest.parallel import in_order
from jobs.manifest.row import Reject, Row
from jobs.manifest.store import Store
from jobs.manifest.transcript import joined_reason, text_faults, text_warning

if TYPE_CHECKING:
    from jobs.tokens import Prompter


def examine_all(
    rows: Iterable[Row],
    store: Store,
    limits: Limits,
    prompter: Prompter | None,
    *,
    processes: int,
    source: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Look at every row and put what was found into the store.

    Args:
        rows: any number of them; they are streamed.
        store: takes clips and remarks.
        limits: what clips must keep to.
        prompter: the checkpoint's tokenizer; None: tokens are not counted.
        processes: that decode.
        source: number of the source, where a store takes several.
        progress: called with the rows done.

    Returns:
        how many rows there were.
    """
    done = 0
    for done, verdicts in enumerate(in_order(partial(examine, limits=limits), rows, processes=processes), 1):
        for verdict in verdicts:
            take(verdict, store, prompter, source)
        progress(done)
    return done


def take(verdict: Verdict, store: Store, prompter: Prompter | None, source: int = 0) -> None:
    """Judge a row's text too, and keep the row or the reasons against it."""
    row, found = verdict
    faults = [found] if isinstance(found, Reject) else []
    if row.fault is None:
        faults += text_faults(row, prompter)
        if warning := text_warning(row):
            store.remark(row, warning, source, warning=True)
    if isinstance(found, Sound) and not faults:
        store.add(row, found, source)
    else:
        store.remark(row, joined_reason(faults), source)
