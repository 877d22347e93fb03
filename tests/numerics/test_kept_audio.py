"""Clips that stay decoded: each file is read once, the numbers are the same to the bit, and the budget is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from engine import Run, events, job

from jobs.fast.encoder_outputs import EncoderOutputs, Origin
from jobs.fast.kept_audio import KeptAudio
from jobs.model import load_processor
from jobs.train.heard import Clips
from service.spec.job import JobSpec

VARIED: dict[str, Any] = {"augment": {"speed": [0.9, 1.1], "noise_prob": 0.5, "gain_db": [-6, 6]}}
TRAIN, VAL = 13, 5
LONGEST_GB = 4 * 20_000 / 1e9
"""A clip of `tones`, of 1.25 s."""


def spec_of(tiny: Path, tones: Path, root: Path, keep_audio_gb: float | None, **training: Any) -> JobSpec:
    sections = VARIED | {"data": {"keep_audio_gb": keep_audio_gb}}
    return job(tiny, tones, root, sections, **{"epochs": 3, "eval_steps": 7, "lr": 0.01} | training)


@contextmanager
def opened() -> Iterator[Counter[str]]:
    """How often each file was decoded meanwhile, by its name; soundfile does what it always does."""
    found: Counter[str] = Counter()
    read = soundfile.SoundFile.read

    def watch(self: Any, *arguments: Any, **options: Any) -> Any:
        found[Path(self.name).name] += 1
        return read(self, *arguments, **options)

    soundfile.SoundFile.read = watch
    try:
        yield found
    finally:
        soundfile.SoundFile.read = read


def decoded_run(spec: JobSpec) -> tuple[Run, Counter[str]]:
    """A run, and how often it decoded each file, beside the once that the check before it does."""
    with opened() as found:
        run = Run(spec)
    return run, Counter({name: times - 1 for name, times in found.items()})


@pytest.fixture(scope="module")
def anew(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Counter[str]]:
    """The reference: each clip is decoded whenever it is heard."""
    return decoded_run(spec_of(tiny, tones, tmp_path_factory.mktemp("anew") / "run", 0))


def assert_equal(one: Run, other: Run) -> None:
    """To the last bit."""
    assert one.steps("loss") == other.steps("loss")
    assert one.result["training"]["history"] == other.result["training"]["history"]
    mine, theirs = one.adapter(), other.adapter()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    for name in ("base", "tuned"):
        path = f"evaluation/{name}.jsonl"
        assert (one.root / path).read_bytes() == (other.root / path).read_bytes()


@pytest.mark.setting("data.keep_audio_gb")
def test_each_clip_is_decoded_once_and_the_run_is_the_one_that_decodes_anew(
    tiny: Path, tones: Path, tmp_path: Path, anew: tuple[Run, Counter[str]]
) -> None:
    reference, times = anew
    assert sorted(times.values()) == [3] * TRAIN + [5] * VAL, "three epochs; base, three evaluations, the result"
    run, times = decoded_run(spec_of(tiny, tones, tmp_path / "run", None))
    assert sorted(times.values()) == [1] * (TRAIN + VAL)
    assert_equal(run, reference)
    assert events(run.session, "notice") == []


@pytest.mark.setting("data.keep_audio_gb")
def test_what_has_no_room_is_decoded_again_and_the_run_says_so(
    tiny: Path, tones: Path, tmp_path: Path, anew: tuple[Run, Counter[str]]
) -> None:
    reference, _ = anew
    run, times = decoded_run(spec_of(tiny, tones, tmp_path / "run", 6 * LONGEST_GB))
    assert 6 <= sum(count == 1 for count in times.values()) < TRAIN + VAL
    assert max(times.values()) > 1
    assert_equal(run, reference)
    (notice,) = [event["text"] for event in events(run.session, "notice")]
    assert "clips are kept decoded in main memory" in notice
    assert "for more there is no room" in notice


def test_clips_that_are_heard_once_or_whose_encoder_outputs_are_kept_are_not_kept(
    tiny: Path, tones: Path, tmp_path: Path
) -> None:
    extractor, audio = load_processor(str(tiny)).feature_extractor, KeptAudio(limit=10**9)
    clips = Clips(spec_of(tiny, tones, tmp_path, None), audio, extractor, torch.device("cpu"), {"again"})
    origin = Origin(str(tiny), None, "sdpa", "no", "cpu", (("train", ""),))
    outputs = EncoderOutputs(origin, torch.device("cpu"), []).of("train")
    clip = {"path": str(tones / "00.wav")}
    for kept, (split, heard) in enumerate((("once", None), ("again", outputs), ("again", None))):
        clips.features(split, heard).of([clip], [0])
        assert audio.clips == (kept == 2)


def test_many_threads_get_a_clips_own_samples_and_the_budget_holds() -> None:
    audio = KeptAudio(limit=50 * 4 * 100)

    def read(turn: int) -> bool:
        row, split = turn % 60, ("one", "two")[turn % 2]
        expected = np.full(100, row + 1000 * (split == "two"), np.float32)
        return bool((audio.of(split).read(row, expected.copy) == expected).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(3000)))
    assert audio.clips == 50
    assert audio.bytes == audio.limit


def test_what_is_kept_cannot_be_written_to() -> None:
    audio = KeptAudio(limit=100)
    audio.of("one").read(0, lambda: np.zeros(5, np.float32))
    with pytest.raises(ValueError, match="read-only"):
        audio.of("one").read(0, lambda: np.ones(5, np.float32))[0] = 1


def test_nothing_is_kept_that_other_processes_need() -> None:
    spare = [40, 0]
    audio = KeptAudio(10**9, lambda: spare.pop(0))
    for row in range(2):
        audio.of("one").read(row, lambda: np.zeros(10, np.float32))
    assert (audio.clips, audio.turned_away) == (1, 1)
