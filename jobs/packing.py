"""Which utterances share a 30 s window in which epoch: `data.packing`.

The plan of an epoch is an order of all rows, cut into windows: a pure function of the rows, seed, epoch and the size of
a forward pass, and so the same in every worker and after a resumption. Rows keep their places in passes and steps:
`per_dev_batch` counts utterances as it does without packing, and a window never reaches from one pass into the next.

It is made in one walk over the epoch's random order. The first row that has no window yet opens one; those of its
language and speaker that come next in that order join it, as long as they fit. A drawn share of the rows stays alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from jobs.audio import SAMPLE_RATE_HZ
from jobs.model import Whisper
from service.spec.job import JobSpec

Entry = int | tuple[int, ...]
"""A row that has a window of its own, or the rows that share one, in their order."""

Plan = tuple[NDArray[np.int64], NDArray[np.bool_]]
"""An epoch's order of the N rows (N,), and which of them begin a window (N,)."""

LOOKAHEAD = 16
"""How many rows that do not fit are passed over before a window is closed."""

ROUNDING = 32
"""Samples that resampling may add to a clip."""

TIMES = 2
"""Tokens of an utterance's begin and end."""

_ALONE = 2**63
"""The stream in which is drawn who stays alone: `Augmenter` has streams for each row, and no row has that number."""


@dataclass(frozen=True, eq=False)
class Joinable:
    """What must be known of N rows to plan windows.

    Attributes:
        group_N: int64; rows of one language and one speaker have the same number. Negative: the row stays alone.
        samples_N: int64, the samples that a row takes at most, at 16 kHz.
        tokens_N: int64, the decoder's positions that it takes at most, its prompt left out.
    """

    group_N: NDArray[np.int64]
    samples_N: NDArray[np.int64]
    tokens_N: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Packing:
    """Plans windows.

    Attributes:
        rows: what is known of the training set.
        window: samples of a window.
        gap: samples of silence between two utterances.
        max_tokens: the decoder's positions that are left beside the prompt.
        single: share of the rows that stay alone, drawn anew in each epoch.
        seed: of the order.
    """

    rows: Joinable
    window: int
    gap: int
    max_tokens: int
    single: float
    seed: int
    _plans: dict[tuple[int, int], Plan] = field(default_factory=dict)

    def plan(self, epoch: int, size: int) -> Plan:
        """An epoch's order of the N rows, and which of them begin a window.

        Args:
            epoch: 0, 1, ...
            size: rows of a forward pass; no window goes beyond one.
        """
        key = epoch, size
        if key not in self._plans:
            while len(self._plans) > 1:  # batches of the next epoch are made while the last one's are still in use
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self._make(epoch, size)
        return self._plans[key]

    def most_windows(self, size: int, epochs: int) -> int:
        """How many windows a forward pass of so many rows holds at most, in that many epochs."""
        starts = np.arange(0, len(self.rows.group_N), size)
        counts = [np.add.reduceat(self.plan(epoch, size)[1].astype(np.int64), starts).max() for epoch in range(epochs)]
        return int(max(counts))

    def _make(self, epoch: int, size: int) -> Plan:
        count = len(self.rows.group_N)
        order_N = random_order(count, self.seed, epoch)
        alone_N = np.random.default_rng([self.seed, epoch, _ALONE]).random(count) < self.single
        group_N = np.where(alone_N, -1, self.rows.group_N)[order_N]
        # Group by group, each in the epoch's order: who opens a window is the first of its group without one.
        queue_N = np.argsort(group_N, kind="stable")
        place_N = np.empty(count, np.int64)
        place_N[queue_N] = np.arange(count)
        ends_N = np.searchsorted(group_N[queue_N], group_N, side="right")
        in_queue = order_N[queue_N]
        ends = np.where(group_N < 0, place_N + 1, ends_N).tolist()
        places, rows = place_N.tolist(), in_queue.tolist()
        samples, tokens = self.rows.samples_N[in_queue].tolist(), self.rows.tokens_N[in_queue].tolist()
        planned: list[int] = []
        begins = bytearray()
        taken = bytearray(count)
        for first, end in zip(places, ends, strict=True):
            if taken[first]:
                continue
            planned.append(rows[first])
            begins.append(1)
            room = size - 1 - (len(planned) - 1) % size
            seconds, words, misses, place = samples[first], tokens[first], 0, first + 1
            while room and place < end and misses < LOOKAHEAD:
                if not taken[place]:
                    longer, more = seconds + self.gap + samples[place], words + tokens[place]
                    if longer <= self.window and more <= self.max_tokens:
                        seconds, words, room = longer, more, room - 1
                        taken[place] = 1
                        planned.append(rows[place])
                        begins.append(0)
                    else:
                        misses += 1
                place += 1
        return np.array(planned, np.int64), np.frombuffer(bytes(begins), np.uint8).astype(np.bool_)


def entries(rows: list[int], begins: list[bool]) -> list[Entry]:
    """Rows in turn as windows; the first of them begins one in any case."""
    found: list[list[int]] = []
    for row, begin in zip(rows, begins, strict=True):
        if begin or not found:
            found.append([row])
        else:
            found[-1].append(row)
    return [tuple(window) if len(window) > 1 else window[0] for window in found]


def flat(pass_: Sequence[Entry]) -> list[int]:
    """The rows of a forward pass."""
    return [row for entry in pass_ for row in (entry if isinstance(entry, tuple) else (entry,))]


@lru_cache(maxsize=2)
def random_order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A random order of rows."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def make_packing(spec: JobSpec, dataset: Any, whisper: Whisper) -> Packing | None:
    """The plan that a spec asks for; None: no packing.

    Args:
        spec: the job.
        dataset: the training set's prepared rows (a datasets.Dataset).
        whisper: knows how long a window is, and how many positions its decoder has.
    """
    if not spec.data.packing:
        return None
    prompter, window = whisper.prompter(), int(whisper.processor.feature_extractor.n_samples)
    prompt = len(prompter.prompt(spec.training.language))
    slowest = min([1.0, *spec.augment.speed])
    return Packing(
        rows=_joinable(dataset.data.table, window, slowest, prompt),
        window=window,
        gap=round(spec.data.packing_gap_s * SAMPLE_RATE_HZ),
        max_tokens=prompter.max_tokens - prompt,
        single=spec.data.packing_single,
        seed=spec.training.seed,
    )


def _joinable(table: pa.Table, window: int, slowest: float, prompt: int) -> Joinable:
    languages, speakers = _codes(table, "language"), _codes(table, "speaker")
    group_N = languages * (int(speakers.max(initial=0)) + 1) + speakers
    group_N[table["no_speech"].to_numpy()] = -1
    samples_N = np.ceil(table["duration_s"].to_numpy().astype(np.float64) / slowest * SAMPLE_RATE_HZ) + ROUNDING
    return Joinable(
        group_N=group_N,
        # `Augmenter` slows no clip down beyond a window, so that a long one is not longer than that.
        samples_N=np.minimum(samples_N, math.inf if slowest == 1 else window).astype(np.int64),
        tokens_N=table["tokens"].to_numpy().astype(np.int64) - prompt + TIMES,
    )


def _codes(table: pa.Table, name: str) -> NDArray[np.int64]:
    """A number for each value of a column of texts; one that is missing is a value too."""
    column = pc.fill_null(table[name], "").combine_chunks()
    codes: NDArray[np.int64] = column.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
    return codes
