"""The choice of `per_dev_batch: auto`: which size, by how few passes, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.packing import Joinable, Packing
from jobs.train.pass_size import ESTIMATE, PROBE, Choice, Passes, largest, largest_that_runs, longest_label, windows_of
from service.spec.job import JobSpec
from service.spec.training import MOST_CLIPS, TrainingConfig
from service.spec.whisper_dims import OPENAI


@given(st.integers(1, 2000), st.integers(0, 2500), st.none() | st.integers(0, 2500))
def test_the_largest_divisor_that_has_room_is_found_and_none_is_tried_twice(
    clips: int, room: int, guess: int | None
) -> None:
    sizes = TrainingConfig(per_dev_batch="auto", grad_accum=clips).pass_sizes
    assert sizes == sorted(size for size in range(1, clips + 1) if clips % size == 0)
    tried: list[int] = []

    def run(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = largest_that_runs(sizes, run, guess)

    assert found == max((size for size in sizes if size <= room), default=1)
    assert len(tried) == len(set(tried))
    assert clips % found == 0


@given(st.lists(st.integers(1, 500), min_size=1, unique=True).map(sorted), st.integers(0, 500))
def test_a_good_guess_takes_two_passes(sizes: list[int], room: int) -> None:
    tried: list[int] = []
    best = max((size for size in sizes if size <= room), default=sizes[0])
    assert largest(sizes, lambda size: tried.append(size) or size <= room, best) == best  # type: ignore[func-returns-value]
    assert len(tried) <= 2


def test_other_errors_of_a_pass_are_not_taken_for_a_lack_of_memory() -> None:
    tidied = []

    def run(size: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        largest_that_runs([1, 2], run, tidy=lambda: tidied.append(1))


def test_what_a_pass_without_room_held_is_free_before_the_next() -> None:
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    seen = []

    def run(size: int) -> None:
        activations = torch.zeros(size)
        alive.append(weakref.ref(activations))
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def tidy() -> None:
        seen.append([each() is None for each in alive])

    assert largest_that_runs([1, 2, 4], run, 4, tidy) == 1
    assert seen == [[True], [True, True], [True, True, True]]


def test_sizes_of_a_step_without_end_are_few() -> None:
    sizes = TrainingConfig(per_dev_batch="auto", grad_accum=10**30).pass_sizes
    assert max(sizes) <= MOST_CLIPS
    assert TrainingConfig(per_dev_batch=3, grad_accum=4).pass_sizes == [3]
    assert TrainingConfig(per_dev_batch=3, grad_accum=4).clips_per_step == 12
    assert TrainingConfig(per_dev_batch="auto", grad_accum=12).clips_per_step == 12


@pytest.mark.parametrize(
    ("tokens", "packed", "expected"), [([5, 17], False, 32), ([16], False, 16), ([447], False, 448), ([5], True, 448)]
)
def test_labels_are_as_wide_as_a_gpu_pads_them(tokens: list[int], packed: bool, expected: int) -> None:
    assert longest_label(tokens, 448, packing_of([(0, 10, 10)]) if packed else None) == expected
    assert longest_label([], 448, None) == 448


def packing_of(clips: list[tuple[int, int, int]]) -> Packing:
    group, samples, tokens = (np.array(values, np.int64) for values in zip(*clips, strict=True))
    return Packing(Joinable(group, samples, tokens), 100, 0, 100, 0.0, 1)


CLIPS = st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 100), st.integers(1, 100)), min_size=1, max_size=60)


@given(CLIPS, st.integers(1, 12), st.integers(1, 3))
def test_the_most_windows_of_a_pass_are_counted_over_all_epochs(
    clips: list[tuple[int, int, int]], size: int, epochs: int
) -> None:
    packing, most = packing_of(clips), 0
    for epoch in range(epochs):
        begins = packing.plan(epoch, size)[1].tolist()
        most = max(most, *(sum(begins[start : start + size]) for start in range(0, len(begins), size)))
    assert windows_of(packing, epochs)(size) == most
    assert windows_of(None, epochs)(size) == size


@pytest.mark.parametrize(
    ("choice", "workers", "said"),
    [
        (Choice(8, 2, PROBE), 1, "(2 passes of 8 clips in each step of 16), by a probe of the GPU's memory"),
        (Choice(16, 1, ESTIMATE), 0, "(1 pass of 16 clips in each step of 16), by an estimate of the memory"),
        (Choice(1, 3, PROBE), 2, "(3 passes of 1 clip in each worker's step of 3), by a probe of the GPU's memory"),
    ],
)
def test_the_choice_is_told_in_one_line(choice: Choice, workers: int, said: str) -> None:
    text = choice.text(kept=False, workers=workers)
    assert text == f"training.per_dev_batch: auto chose {choice.per_dev_batch} {said}"
    again = choice.text(kept=True, workers=workers)
    assert again == f"training.per_dev_batch: auto stays at {choice.per_dev_batch} {said.split('), ')[0]}), " + (
        "chosen when the run began"
    )


def test_the_estimate_grows_with_clips_labels_and_trials() -> None:
    spec = JobSpec(training={"per_dev_batch": "auto", "grad_accum": 8, "freeze_encoder": True})

    def total(size: int = 2, tokens: int = 64, trials: int = 0) -> int:
        rows: dict[str, int | None] = {"train": 10, "val": 10}
        dims = OPENAI["openai/whisper-tiny"]
        return Passes(spec, dims, 1000, True, tokens, lambda size: size, rows, trials).memory(size).total

    assert total() < total(size=4)
    assert total() < total(tokens=448)
    assert total() < total(trials=2) < total(trials=8)
