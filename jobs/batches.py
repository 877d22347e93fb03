"""Batches for training: a fixed order per seed and epoch, decoded ahead of the model by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.audio import SAMPLE_RATE_HZ, read_audio
from jobs.augment import Augmenter
from jobs.fast.encoder_outputs import Heard, SplitOutputs
from jobs.fast.kept_audio import SplitAudio
from jobs.fast.log_mel import LogMel
from jobs.packing import Entry, Packing, entries, flat, random_order
from jobs.tokens import Prompter, Tokens, pad
from jobs.windows import encode_window, join_clips

WIDTH_STEP = 16
"""On a GPU T is a multiple of it: each new shape costs kernels that are chosen anew, and pieces of memory."""


@dataclass(frozen=True)
class Batch:
    """One forward pass. B windows, M mel bins, F = 3000 frames of 10 ms, T tokens."""

    features_BMF: Tensor
    """Of all windows or, with `heard`, of those whose encoder outputs are missing in it."""
    inputs_BT: Tensor
    labels_BT: Tensor
    rows: list[int]
    """The clips in them: B, or more where some share a window."""
    heard: Heard | None = None
    """The clips' encoder outputs, as far as they are kept."""


@dataclass(frozen=True)
class Schedule:
    """Which rows go where: a pure function of seed, epoch and step, so that any worker count sees the same steps.

    Args:
        rows: rows of the training set.
        per_dev_batch: clips in one forward pass.
        grad_accum: forward passes of a worker in one optimizer step.
        workers: number of workers.
        seed: seed of the order.
        packing: joins clips in windows; None: each has its own.
    """

    rows: int
    per_dev_batch: int
    grad_accum: int
    workers: int
    seed: int
    packing: Packing | None = None

    @property
    def effective_batch(self) -> int:
        """Clips in one optimizer step."""
        return self.per_dev_batch * self.grad_accum * self.workers

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last one may hold fewer clips."""
        return -(-self.rows // self.effective_batch)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The rows in the order of that epoch (0, 1, ...)."""
        if self.packing is not None:
            return self.packing.plan(epoch, self.per_dev_batch)[0]
        return random_order(self.rows, self.seed, epoch)

    def passes(self, step: int, rank: int) -> list[list[Entry]]:
        """The rows of one worker in one optimizer step (0, 1, ...), a list per forward pass; lists may be empty. Rows
        that share a window stand in a tuple."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chunk = slice(index * self.effective_batch, (index + 1) * self.effective_batch)
        size = self.per_dev_batch
        starts = [(turn * self.workers + rank) * size for turn in range(self.grad_accum)]
        rows = self.order(epoch)[chunk].tolist()
        if self.packing is None:
            return [rows[start : start + size] for start in starts]
        begins = self.packing.plan(epoch, size)[1][chunk].tolist()
        return [entries(rows[start : start + size], begins[start : start + size]) for start in starts]


def read_clip(record: dict[str, Any]) -> NDArray[np.float32]:
    """A row's samples (S,) at 16 kHz: its file, or the part of it that the row is."""
    return read_audio(record["path"], record.get("start_s"), record.get("end_s"), record.get("version") or "")


@dataclass(frozen=True)
class Features:
    """How the rows of a split become features.

    Attributes:
        log_mel: makes features of samples.
        audio: where decoded clips are kept; None: each is decoded whenever it is heard.
    """

    log_mel: LogMel
    audio: SplitAudio | None = None

    def samples(self, record: dict[str, Any], row: int) -> NDArray[np.float32]:
        """A row's samples (S,), not to be written to."""
        return self.audio.read(row, lambda: read_clip(record)) if self.audio else read_clip(record)

    def of(self, records: list[dict[str, Any]], rows: list[int]) -> Tensor:
        """Log-mel features of rows (B, M, F)."""
        return self.log_mel([self.samples(*each) for each in zip(records, rows, strict=True)])


def features_or_heard(
    features: Features, records: list[dict[str, Any]], rows: list[int], outputs: SplitOutputs | None
) -> tuple[Tensor, Heard | None]:
    """Log-mel features of rows or, with encoder outputs, of those that are missing there; and what was found."""
    if outputs is None:
        return features.of(records, rows), None
    heard = outputs.look_up(rows)
    missing = heard.missing
    if not missing:
        return torch.empty(0), heard
    return features.of([records[place] for place in missing], [rows[place] for place in missing]), heard


class Loader:
    """Turns rows into batches.

    Args:
        dataset: rows with `path`, `text` and `language` (a datasets.Dataset, memory-mapped).
        features: makes features of rows; a WhisperFeatureExtractor stands for its own, as they are made on the CPU.
        prompter: builds the decoder's tokens.
        threads: threads that decode and compute features.
        prefetch: batches that are made ahead.
        augmenter: varies clips in training; None: they stay as they are, and no timestamps are trained.
        timestamps: share of the rows with segments whose labels have timestamps, in training.
        outputs: encoder outputs of the rows, which then are neither decoded nor varied; None: the encoder is to run.
        gap_s: seconds of silence between clips that share a window.
    """

    def __init__(
        self,
        dataset: Any,
        features: Any,
        prompter: Prompter,
        *,
        threads: int,
        prefetch: int,
        augmenter: Augmenter | None = None,
        timestamps: float = 0.0,
        outputs: SplitOutputs | None = None,
        gap_s: float = 0.0,
    ) -> None:
        self._dataset = dataset
        self._features: Features = features if isinstance(features, Features) else Features(LogMel(features))
        self._prompter = prompter
        self._threads = threads
        self._prefetch = prefetch
        self._augmenter = augmenter
        self._timestamps = timestamps
        self._outputs = outputs
        self._gap = round(gap_s * SAMPLE_RATE_HZ)

    def make(self, entries: Sequence[Entry], epoch: int | None = None) -> Batch:
        """Read and featurise these rows; in an epoch of the training (0, 1, ...) they are varied, else as they are."""
        rows = flat(entries)
        if len(rows) > len(entries):
            return self._join(entries, epoch)
        records = [self._dataset[row] for row in rows]
        speeds, heard = [1.0] * len(rows), None
        if self._outputs is None and self._augmenter is not None and epoch is not None:
            features, speeds = self._vary(records, rows, epoch, self._augmenter)
        else:
            features, heard = features_or_heard(self._features, records, rows, self._outputs)
        tokens = [self._encode(*each, epoch) for each in zip(records, rows, speeds, strict=True)]
        inputs, labels = self._stack(tokens)
        return Batch(features, inputs, labels, rows, heard)

    def _stack(self, tokens: list[Tokens]) -> tuple[Tensor, Tensor]:
        """Decoder inputs and labels (B, T); for a GPU few different T, in memory that it copies from by itself."""
        if self._features.log_mel.device.type != "cuda":
            return pad(tokens, fill=tokens[0].labels[-1])
        longest = max(len(each.inputs) for each in tokens)
        width = min(-(-longest // WIDTH_STEP) * WIDTH_STEP, self._prompter.max_tokens)
        inputs_BT, labels_BT = pad(tokens, fill=tokens[0].labels[-1], width=width)
        return inputs_BT.pin_memory(), labels_BT.pin_memory()

    def _join(self, entries: Sequence[Entry], epoch: int | None) -> Batch:
        """A batch of windows that clips share. Each clip is varied as it is alone; masks and whether a window has
        timestamps are drawn by its first row."""
        windows = [entry if isinstance(entry, tuple) else (entry,) for entry in entries]
        joined, tokens = [], []
        for rows in windows:
            records = [self._dataset[row] for row in rows]
            clips, speeds = zip(*(self._varied(*each, epoch) for each in zip(records, rows, strict=True)), strict=True)
            samples_S, spans = join_clips(clips, self._gap)
            joined.append(samples_S)
            if len(rows) == 1:
                tokens.append(self._encode(records[0], rows[0], speeds[0], epoch))
            else:
                timed = self._with_timestamps(rows[0], epoch)
                tokens.append(encode_window(self._prompter, records, spans, speeds, timestamps=timed))
        features = self._features.log_mel(joined)
        if self._augmenter is not None and epoch is not None:
            self._augmenter.mask(features, [len(clip) for clip in joined], epoch, [rows[0] for rows in windows])
        inputs, labels = self._stack(tokens)
        return Batch(features, inputs, labels, flat(entries))

    def _varied(self, record: dict[str, Any], row: int, epoch: int | None) -> tuple[NDArray[np.float32], float]:
        """A clip and its speed."""
        samples_S = self._features.samples(record, row)
        if self._augmenter is None or epoch is None:
            return samples_S, 1.0
        return self._augmenter.audio(samples_S, epoch, row)

    def _with_timestamps(self, row: int, epoch: int | None) -> bool:
        if self._augmenter is None or epoch is None:
            return False
        return self._augmenter.with_timestamps(self._timestamps, epoch, row)

    def _vary(
        self, records: list[dict[str, Any]], rows: list[int], epoch: int, augmenter: Augmenter
    ) -> tuple[Tensor, list[float]]:
        """Features of varied clips, and their speeds."""
        clips = map(self._features.samples, records, rows)
        varied = [augmenter.audio(clip, epoch, row) for clip, row in zip(clips, rows, strict=True)]
        features = self._features.log_mel([clip for clip, _ in varied])
        augmenter.mask(features, [len(clip) for clip, _ in varied], epoch, rows)
        return features, [speed for _, speed in varied]

    def _encode(self, record: dict[str, Any], row: int, speed: float, epoch: int | None) -> Tokens:
        return self._prompter.encode_row(record, timestamps=self._with_timestamps(row, epoch), speed=speed)

    def steps(self, schedule: Schedule, rank: int, first: int, end: int) -> Iterator[list[Batch]]:
        """The batches of optimizer steps first..end-1 for one worker; empty forward passes are left out."""
        ahead: deque[list[Future[Batch]]] = deque()
        upcoming = iter(range(first, end))
        with ThreadPoolExecutor(self._threads, thread_name_prefix="audio") as pool:
            try:
                while True:
                    while sum(map(len, ahead)) < self._prefetch and (step := next(upcoming, None)) is not None:
                        epoch = step // schedule.steps_per_epoch
                        passes = [rows for rows in schedule.passes(step, rank) if rows]
                        ahead.append([pool.submit(self.make, rows, epoch) for rows in passes])
                    if not ahead:
                        return
                    yield [future.result() for future in ahead.popleft()]
            finally:
                for futures in ahead:
                    for future in futures:
                        future.cancel()


def label_tokens(batches: list[Batch]) -> int:
    """How many tokens the loss of these batches is over."""
    return int(sum((batch.labels_BT >= 0).sum() for batch in batches)) if batches else 0


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    import random

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
