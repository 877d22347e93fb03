"""Every row is trained on once per epoch, whatever the number of workers, in batches that threads make ahead."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from engine import SAMPLE_RATE_HZ, job, prepared, tone
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from jobs.audio import read_audio
from jobs.batches import Batch, Loader, Schedule, label_tokens, log_mel, seed_everything
from jobs.model import load_processor, load_prompter
from jobs.packing import Entry
from service.errors import ManifestError

SCHEDULES = st.builds(
    Schedule,
    rows=st.integers(1, 60),
    per_dev_batch=st.integers(1, 5),
    grad_accum=st.integers(1, 4),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)


def rows_of(schedule: Schedule, step: int) -> list[list[int]]:
    """Rows of one optimizer step, a list per forward pass of any worker, in the order in which they are dealt out."""
    passes = [schedule.passes(step, rank) for rank in range(schedule.workers)]
    return [passes[rank][turn] for turn in range(schedule.grad_accum) for rank in range(schedule.workers)]


@given(SCHEDULES, st.integers(0, 3))
def test_every_row_is_used_exactly_once_per_epoch(schedule: Schedule, epoch: int) -> None:
    used: list[int] = []
    for step in range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch):
        passes = rows_of(schedule, step)
        assert all(len(rows) <= schedule.per_dev_batch for rows in passes)
        assert any(passes), "a step without a row"
        used += [row for rows in passes for row in rows]
    assert sorted(used) == list(range(schedule.rows))


@given(SCHEDULES, st.integers(0, 3))
def test_all_steps_but_an_epochs_last_are_full(schedule: Schedule, epoch: int) -> None:
    first = epoch * schedule.steps_per_epoch
    sizes = [sum(map(len, rows_of(schedule, first + index))) for index in range(schedule.steps_per_epoch)]
    assert sizes[:-1] == [schedule.effective_batch] * (len(sizes) - 1)


@given(SCHEDULES, st.integers(0, 20))
def test_one_worker_sees_the_same_steps_at_the_same_effective_batch(schedule: Schedule, step: int) -> None:
    alone = Schedule(schedule.rows, schedule.per_dev_batch, schedule.grad_accum * schedule.workers, 1, schedule.seed)
    assert rows_of(alone, step) == rows_of(schedule, step)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    one = Schedule(rows=50, per_dev_batch=4, grad_accum=1, workers=2, seed=1)
    assert one.order(0).tolist() == Schedule(50, 1, 1, 1, seed=1).order(0).tolist()
    orders = {tuple(schedule.order(epoch)) for schedule in (one, Schedule(50, 4, 1, 2, seed=2)) for epoch in range(3)}
    assert len(orders) == 6


def test_the_order_is_not_moved_by_the_global_generators() -> None:
    schedule = Schedule(rows=50, per_dev_batch=4, grad_accum=1, workers=1, seed=1)
    before = schedule.order(3).tolist()
    seed_everything(99)
    assert schedule.order(3).tolist() == before


class Data:
    """The rows of `tones`, as the engine reads them."""

    def __init__(self, tiny: Path, tones: Path, root: Path) -> None:
        task = prepared(job(tiny, tones, root))
        self.rows = Dataset.from_file(task.train)
        self.extractor = load_processor(str(tiny)).feature_extractor
        self.prompter = load_prompter(str(tiny))

    def loader(self, *, threads: int, prefetch: int, rows: Any = None) -> Loader:
        return Loader(rows or self.rows, self.extractor, self.prompter, threads=threads, prefetch=prefetch)


@pytest.fixture(scope="module")
def data(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tiny, tones, tmp_path_factory.mktemp("batches"))


def audio_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("audio")]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.rows == other.rows
    for name in ("features_BMF", "inputs_BT", "labels_BT"):
        assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (4, 7), (2, 100)])
def test_batches_made_ahead_are_those_made_one_by_one(data: Data, threads: int, prefetch: int, workers: int) -> None:
    loader = data.loader(threads=threads, prefetch=prefetch)
    schedule = Schedule(rows=len(data.rows), per_dev_batch=2, grad_accum=2, workers=workers, seed=0)
    first, end = 1, 2 * schedule.steps_per_epoch
    for rank in range(workers):
        steps = list(loader.steps(schedule, rank, first, end))
        assert len(steps) == end - first
        for step, batches in zip(range(first, end), steps, strict=True):
            expected = [rows for rows in schedule.passes(step, rank) if rows]
            assert [batch.rows for batch in batches] == expected
            for batch, rows in zip(batches, expected, strict=True):
                assert_equal(batch, loader.make(rows))
    assert audio_threads() == []


def test_a_step_without_rows_for_a_worker_is_still_a_step(data: Data) -> None:
    schedule = Schedule(rows=3, per_dev_batch=2, grad_accum=1, workers=3, seed=0)
    assert list(data.loader(threads=1, prefetch=1).steps(schedule, 2, 0, 1)) == [[]]
    assert label_tokens([]) == 0


def test_no_more_is_read_than_asked_to_be_made_ahead(data: Data) -> None:
    class Counted(Loader):
        made = 0

        def make(self, entries: Sequence[Entry], epoch: int | None = None) -> Batch:
            Counted.made += 1
            return super().make(entries, epoch)

    schedule = Schedule(rows=len(data.rows), per_dev_batch=1, grad_accum=1, workers=1, seed=0)
    loader = Counted(data.rows, data.extractor, data.prompter, threads=2, prefetch=3)
    steps = loader.steps(schedule, 0, 0, 13)
    for _ in range(4):
        next(steps)
    steps.close()  # type: ignore[attr-defined]  # it is a generator
    assert 4 <= Counted.made <= 4 + 3
    assert audio_threads() == []


@pytest.mark.parametrize("prefetch", [1, 8])
def test_an_unreadable_clip_ends_the_iteration_and_its_threads(data: Data, prefetch: int) -> None:
    paths = [*data.rows["path"]]
    paths[4] = "/nowhere/gone.wav"
    rows = data.rows.remove_columns("path").add_column("path", paths)
    schedule = Schedule(rows=len(rows), per_dev_batch=1, grad_accum=1, workers=1, seed=0)
    with pytest.raises(ManifestError, match=r"/nowhere/gone\.wav: no such file"):
        list(data.loader(threads=3, prefetch=prefetch, rows=rows).steps(schedule, 0, 0, 13))
    assert audio_threads() == []


def test_batches_have_the_decoders_and_encoders_shapes(data: Data) -> None:
    batch = data.loader(threads=1, prefetch=1).make([5, 0, 2])
    assert batch.features_BMF.shape == (3, 80, 200)
    assert batch.features_BMF.dtype == torch.float32
    counted = (batch.labels_BT >= 0).sum(1).tolist()
    assert counted == data.rows.select([5, 0, 2])["tokens"][:]
    assert label_tokens([batch, batch]) == 2 * sum(counted)


@pytest.mark.parametrize("mel_bins", [80, 128])
def test_features_are_those_of_transformers_extractor(data: Data, mel_bins: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    clips = [read_audio(data.rows[0]["path"]), tone(3.0), np.zeros(5, np.float32)]
    features_BMF = log_mel(extractor, clips)
    assert features_BMF.shape == (3, mel_bins, 3000)
    for clip, features_MF in zip(clips, features_BMF, strict=True):
        alone = extractor(clip, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features[0]
        torch.testing.assert_close(features_MF, alone, atol=1e-6, rtol=0)


def test_seeding_twice_gives_the_same_random_numbers() -> None:
    import random

    drawn = []
    for _ in range(2):
        seed_everything(7)
        drawn.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
