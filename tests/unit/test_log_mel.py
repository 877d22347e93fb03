"""Log-mel features of our own are those of transformers' extractor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engine import tone
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperFeatureExtractor

from jobs.audio import SAMPLE_RATE_HZ
from jobs.augment import Augmenter
from jobs.fast.log_mel import LogMel
from service.spec.augment import AugmentConfig

WINDOW = 30 * SAMPLE_RATE_HZ
LENGTHS = (0, 1, 5, 159, 200, 201, 399, 400, 16_000, 79_999, 200_007, WINDOW - 441, WINDOW - 440, WINDOW - 200,
           WINDOW - 41, WINDOW - 1, WINDOW, WINDOW + 9_000)  # fmt: skip
"""Samples: within the first frame, around the mirrored begin, up to and beyond the mirrored end of the window."""


def speech_like(length: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise that swells and fades, with a tone in it."""
    noise = np.random.default_rng(seed).standard_normal(length) * np.sin(np.arange(length) / 3000) ** 2
    return (0.1 * noise).astype(np.float32) + tone(length / SAMPLE_RATE_HZ)[:length]


def theirs(extractor: Any, clip: NDArray[np.float32]) -> Tensor:
    features: Tensor = extractor(clip, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features[0]
    return features


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.setting("engine.fast_features")
def test_features_are_those_of_transformers_extractor(mel_bins: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    clips = [speech_like(length) for length in LENGTHS] + [np.zeros(3_000, np.float32), speech_like(4_000) * 1e-6]
    features_BMF = LogMel(extractor)(clips)
    assert features_BMF.shape == (len(clips), mel_bins, 3000)
    for clip, features_MF in zip(clips, features_BMF, strict=True):
        torch.testing.assert_close(features_MF, theirs(extractor, clip), atol=1e-6, rtol=0, msg=f"{len(clip)} samples")


def test_windows_of_another_length_have_their_own_end() -> None:
    extractor = WhisperFeatureExtractor(chunk_length=2)
    for length in (900, 31_900, 32_000, 40_000):
        clip = speech_like(length)
        torch.testing.assert_close(LogMel(extractor)([clip])[0], theirs(extractor, clip), atol=1e-6, rtol=0)


def test_a_clips_features_do_not_depend_on_its_batch() -> None:
    log_mel = LogMel(WhisperFeatureExtractor())
    clips = [speech_like(length, seed) for seed, length in enumerate((WINDOW, 30_000, 7, 161_234))]
    together = log_mel(clips)
    for clip, features_MF in zip(clips, together, strict=True):
        assert torch.equal(log_mel([clip])[0], features_MF)


@pytest.mark.setting("engine.fast_features")
@pytest.mark.parametrize("fast", [True, False])
def test_mixed_precision_around_it_rounds_nothing(fast: bool) -> None:
    log_mel, clip = LogMel(WhisperFeatureExtractor(), fast=fast), speech_like(20_000)
    alone = log_mel([clip])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel([clip]), alone)


@pytest.mark.setting("engine.fast_features")
def test_switched_off_or_with_a_changed_extractor_the_extractor_itself_makes_them() -> None:
    calls = []

    class Watched(WhisperFeatureExtractor):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            calls.append(len(arguments[0]))
            return super().__call__(*arguments, **options)

    clips = [speech_like(1_000), speech_like(2_000)]
    LogMel(Watched())(clips)
    assert calls == [2]
    plain = WhisperFeatureExtractor()
    assert torch.equal(LogMel(plain, fast=False)(clips)[1], theirs(plain, clips[1]))
    padded = WhisperFeatureExtractor(padding_value=0.25)
    assert torch.equal(LogMel(padded)(clips)[1], theirs(padded, clips[1]))


def test_masks_lie_over_our_features_as_over_theirs() -> None:
    settings = AugmentConfig(mask_time_prob=0.3, mask_feature_prob=0.3)
    extractor, clips = WhisperFeatureExtractor(), [speech_like(50_000), speech_like(9_000)]
    ours, expected = LogMel(extractor)(clips), torch.stack([theirs(extractor, clip) for clip in clips])
    for features_BMF in (ours, expected):
        Augmenter(settings, 3).mask(features_BMF, [50_000, 9_000], 1, [4, 7])
    assert ((ours == 0) == (expected == 0)).all()
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
