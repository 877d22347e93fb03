"""Training clips vary by seed, epoch and row alone; masks are transformers' own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from engine import tone
from transformers import WhisperConfig, WhisperModel
from waits import DEVICE, Waits

from jobs.augment import Augmenter, add_noise, change_speed, change_volume, mask_indices
from jobs.batches import Loader, Schedule
from jobs.tokens import Prompter
from service.spec.augment import AugmentConfig

ALL = AugmentConfig(
    mask_time_prob=0.1,
    mask_feature_prob=0.1,
    speed=[0.9, 1.0, 1.1],
    noise_prob=0.5,
    noise_snr_db=[5, 20],
    gain_db=[-6, 6],
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("augment")
    found = []
    for number in range(12):
        path: Path = folder / f"{number}.wav"
        soundfile.write(path, tone(0.5 + number / 10, 200 + 50 * number), 16_000)
        segments = f'[[0.0, 0.2, "one"], [0.2, {0.4 + number / 10}, "two"]]' if number % 2 else ""
        found.append({"path": str(path), "text": "one two", "language": "en", "segments": segments, "no_speech": False})
    return found


def loader_of(rows: Any, processor: Any, settings: AugmentConfig, *, seed: int = 7, threads: int = 1) -> Loader:
    prompter = Prompter(processor.tokenizer, multilingual=True, max_tokens=448)
    augmenter = Augmenter(settings, seed)
    return Loader(
        rows, processor.feature_extractor, prompter, threads=threads, prefetch=4, augmenter=augmenter, timestamps=0.5
    )


def by_row(loader: Loader, workers: int, epochs: int = 2) -> dict[tuple[int, int], tuple[Any, list[int]]]:
    """Features and labels of every (epoch, row), as `workers` workers see them."""
    schedule = Schedule(rows=12, per_dev_batch=2, grad_accum=1, workers=workers, seed=7)
    found = {}
    for rank in range(workers):
        steps = loader.steps(schedule, rank, 0, epochs * schedule.steps_per_epoch)
        for step, batches in enumerate(steps):
            for batch in batches:
                for features_MF, labels_T, row in zip(batch.features_BMF, batch.labels_BT, batch.rows, strict=True):
                    labels = [int(label) for label in labels_T if label >= 0]
                    found[step // schedule.steps_per_epoch, row] = (features_MF.numpy(), labels)
    return found


def test_what_is_drawn_depends_on_no_worker_and_no_thread(rows: Any, processor: Any) -> None:
    one = by_row(loader_of(rows, processor, ALL), workers=1)
    assert len(one) == 24
    for workers, threads in ((1, 4), (2, 2), (3, 1)):
        again = by_row(loader_of(rows, processor, ALL, threads=threads), workers=workers)
        assert again.keys() == one.keys()
        for place, (features_MF, labels) in one.items():
            np.testing.assert_array_equal(again[place][0], features_MF)
            assert again[place][1] == labels


def test_epochs_and_seeds_draw_anew(rows: Any, processor: Any) -> None:
    one = by_row(loader_of(rows, processor, ALL), workers=1)
    other = by_row(loader_of(rows, processor, ALL, seed=8), workers=1)
    assert sum(not np.array_equal(one[0, row][0], one[1, row][0]) for row in range(12)) == 12
    assert sum(not np.array_equal(one[0, row][0], other[0, row][0]) for row in range(12)) == 12
    timed = {place for place, (_, labels) in one.items() if max(labels) > 50364}
    assert {row for _, row in timed} <= set(range(1, 12, 2))
    assert 0 < len(timed) < 12


def test_nothing_is_varied_unless_asked_for_and_never_outside_of_training(rows: Any, processor: Any) -> None:
    plain = loader_of(rows, processor, AugmentConfig()).make([0, 2], epoch=0)
    varied = loader_of(rows, processor, ALL)
    torch.testing.assert_close(varied.make([0, 2]).features_BMF, plain.features_BMF, rtol=0, atol=0)
    assert not torch.equal(varied.make([0, 2], epoch=0).features_BMF, plain.features_BMF)


@pytest.mark.parametrize("seed", range(5))
def test_the_masks_are_those_of_transformers(seed: int) -> None:
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        apply_spec_augment=True, mask_time_prob=0.1, mask_time_length=7, mask_time_min_masks=2,
        mask_feature_prob=0.2, mask_feature_length=5, mask_feature_min_masks=1,
    )  # fmt: skip
    model = WhisperModel(config).train()
    heard = torch.arange(3000)[None] < 400
    np.random.seed(seed)
    expected = model._mask_input_features(torch.ones(1, 80, 3000), attention_mask=heard)[0]
    random = np.random.RandomState(seed)
    time_F = mask_indices(random, (1, 3000), mask_prob=0.1, mask_length=7, attention_mask=heard, min_masks=2)[0]
    bins_M = mask_indices(random, (1, 80), mask_prob=0.2, mask_length=5, min_masks=1)[0]
    ours = torch.ones(80, 3000)
    ours[:, torch.from_numpy(time_F)] = 0
    ours[torch.from_numpy(bins_M)] = 0
    assert 0 < time_F.sum() < 400
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_masks_lie_in_what_is_heard_and_leave_numpys_own_state_alone() -> None:
    augmenter = Augmenter(AugmentConfig(mask_time_prob=0.2), 1)
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)

    def masked(row: int) -> torch.Tensor:
        features = torch.ones(1, 80, 3000)
        augmenter.mask(features, [16_000], 0, [row])
        return features

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(masked, range(40)))
    assert np.random.random() == expected
    for row, features in enumerate(found):
        assert torch.equal(features, masked(row))
        assert float(features[..., 100:].min()) == 1
        assert 0.02 < 1 - float(features[..., :100].mean()) < 0.5


def test_a_batch_is_masked_as_each_clip_alone() -> None:
    augmenter, lengths, rows = Augmenter(ALL, 1), [16_000, 480_000, 200_000], [5, 0, 7]
    together = torch.ones(3, 80, 3000)
    augmenter.mask(together, lengths, 2, rows)
    for features_MF, length, row in zip(together, lengths, rows, strict=True):
        alone = torch.ones(1, 80, 3000)
        augmenter.mask(alone, [length], 2, [row])
        assert torch.equal(features_MF, alone[0])
        bins_M, times_F = features_MF.amax(1) == 0, features_MF.amax(0) == 0
        assert bins_M.any() and times_F.any() and not (bins_M.all() or times_F.all())
        assert torch.equal(features_MF == 0, bins_M[:, None] | times_F[None])


@pytest.mark.parametrize("settings", [ALL, AugmentConfig(mask_time_prob=0.1), AugmentConfig(mask_feature_prob=0.1)])
def test_masks_on_a_gpu_wait_for_nothing(settings: AugmentConfig) -> None:
    features_BMF = torch.empty(4, 80, 3000, device=DEVICE)
    with Waits() as waits:
        Augmenter(settings, 1).mask(features_BMF, [16_000] * 4, 0, [0, 1, 2, 3])
    assert waits.found == []


@pytest.mark.parametrize("length", [0, 1, 50, 161])
def test_the_shortest_clips_are_borne(length: int) -> None:
    augmenter = Augmenter(ALL, 1)
    samples, _ = augmenter.audio(np.full(length, 0.1, np.float32), 0, 0)
    augmenter.mask(torch.ones(1, 80, 3000), [len(samples)], 0, [0])


def pitch_of(samples_S: Any) -> float:
    return float(np.abs(np.fft.rfft(samples_S * np.hanning(len(samples_S)))).argmax() * 16_000 / len(samples_S))


@pytest.mark.parametrize("speed", [0.9, 1.1, 1.5])
def test_speed_changes_length_and_pitch(speed: float) -> None:
    changed = change_speed(tone(2.0, 440), speed)
    assert len(changed) == pytest.approx(32_000 / speed, abs=2)
    assert pitch_of(changed) == pytest.approx(440 * speed, abs=2)


def test_no_clip_is_slowed_down_beyond_thirty_seconds() -> None:
    samples, speed = Augmenter(AugmentConfig(speed=[0.5]), 1).audio(tone(29.0), 0, 0)
    assert len(samples) <= 30 * 16_000
    assert speed == pytest.approx(29 / 30)


def test_noise_has_the_ratio_that_is_asked_for() -> None:
    clean = tone(2.0)
    for seed in range(6):
        noise = add_noise(clean, 10.0, np.random.default_rng(seed)) - clean
        assert 10 * np.log10(np.mean(clean**2) / np.mean(noise**2)) == pytest.approx(10, abs=0.1)


def test_volume_changes_but_clips_nothing() -> None:
    assert np.abs(change_volume(tone(1.0), -6.0206)).max() == pytest.approx(0.25, abs=1e-3)
    assert np.abs(change_volume(tone(1.0), 40.0)).max() == pytest.approx(1.0, abs=1e-3)


def test_times_of_segments_follow_the_speed(processor: Any) -> None:
    prompter = Prompter(processor.tokenizer, multilingual=True, max_tokens=448)
    record = {"text": "one", "language": "en", "segments": '[[1.0, 2.0, "one"]]', "no_speech": False}
    first = processor.tokenizer.convert_tokens_to_ids("<|0.00|>")
    slow = prompter.encode_row(record, timestamps=True, speed=0.5)
    assert [label - first for label in slow.labels if label >= first] == [100, 200]
