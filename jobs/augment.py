"""Training clips varied at random: what is drawn depends on seed, epoch and row alone, never on worker or thread."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.whisper import modeling_whisper

from jobs.audio import MAX_DURATION_S, SAMPLE_RATE_HZ
from service.spec.augment import AugmentConfig

HOP = 160
"""Samples of a frame, at 16 kHz."""

# What is drawn for: each has a stream of its own, so that switching one on does not change another.
_SPEED, _NOISE, _GAIN, _MASK, _TIMESTAMPS = range(5)

_EXPONENTS = (0.0, 0.5, 1.0)
"""White, pink and brown noise: their amplitude falls with this power of the frequency."""


class _NumpyWith:
    """numpy with another source of random numbers than its global one."""

    def __init__(self, random: np.random.RandomState) -> None:
        self.random = random

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def mask_indices(random: np.random.RandomState, shape: tuple[int, int], **arguments: Any) -> NDArray[np.bool_]:
    """transformers' own SpecAugment masks, drawn from `random`.

    Its function draws from numpy's global state, which threads share: here its code runs with a numpy whose `random` is
    the one given. With np.random.seed(s) and RandomState(s) the masks are the same.
    """
    function = modeling_whisper._compute_mask_indices
    own = FunctionType(
        function.__code__, function.__globals__ | {"np": _NumpyWith(random)}, argdefs=function.__defaults__
    )
    masks: NDArray[np.bool_] = own(shape, **arguments)
    return masks


class Augmenter:
    """Varies clips.

    Args:
        settings: what to vary, and how much.
        seed: the training's seed.
    """

    def __init__(self, settings: AugmentConfig, seed: int) -> None:
        self._settings, self._seed = settings, seed

    def _random(self, what: int, epoch: int, row: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch, row, what])

    def with_timestamps(self, share: float, epoch: int, row: int) -> bool:
        """Whether a row that has segments is trained with timestamps in this epoch."""
        return share > 0 and self._random(_TIMESTAMPS, epoch, row).random() < share

    def audio(self, samples_S: NDArray[np.float32], epoch: int, row: int) -> tuple[NDArray[np.float32], float]:
        """Vary a clip's speed, noise and volume.

        Args:
            samples_S: float32 (S,) at 16 kHz.
            epoch: 0, 1, ...
            row: the clip's row in the training set.

        Returns:
            the samples, and the speed at which they now run (1: as before); times inside the clip are divided by it.
        """
        settings, speed = self._settings, 1.0
        if settings.speed:
            drawn = float(self._random(_SPEED, epoch, row).choice(settings.speed))
            speed = max(drawn, len(samples_S) / (MAX_DURATION_S * SAMPLE_RATE_HZ))
            samples_S = change_speed(samples_S, speed)
        noise = self._random(_NOISE, epoch, row)
        if settings.noise_prob and noise.random() < settings.noise_prob:
            lowest, highest = settings.noise_snr_db
            samples_S = add_noise(samples_S, noise.uniform(lowest, highest), noise)
        lowest, highest = settings.gain_db
        if lowest or highest:
            gain_db = self._random(_GAIN, epoch, row).uniform(lowest, highest)
            samples_S = change_volume(samples_S, gain_db)
        return samples_S, speed

    def mask(self, features_BMF: Tensor, lengths: list[int], epoch: int, rows: list[int]) -> None:
        """Put SpecAugment's masks over features, in place.

        Args:
            features_BMF: log-mel features (B, M, F).
            lengths: samples of each clip: its masks lie in what is heard, not in the silence behind it.
            epoch: 0, 1, ...
            rows: the clips' rows.
        """
        settings = self._settings
        if not settings.mask_time_prob and not settings.mask_feature_prob:
            return
        clips, bins, frames = features_BMF.shape
        device = features_BMF.device
        # All masks of the batch go to a GPU in one copy, which nobody waits for.
        masked = torch.zeros(clips, frames + bins, dtype=torch.bool, pin_memory=device.type == "cuda")
        for masked_X, length, row in zip(masked.numpy(), lengths, rows, strict=True):
            random = np.random.RandomState(self._random(_MASK, epoch, row).integers(2**32, dtype=np.uint32))
            if settings.mask_time_prob:
                heard_1F = torch.arange(frames)[None] < max(1, min(frames, -(-length // HOP)))
                masked_X[:frames] = mask_indices(
                    random,
                    (1, frames),
                    mask_prob=settings.mask_time_prob,
                    mask_length=min(settings.mask_time_length, frames),
                    attention_mask=heard_1F,
                    min_masks=settings.mask_time_min_masks,
                )[0]
            if settings.mask_feature_prob:
                masked_X[frames:] = mask_indices(
                    random,
                    (1, bins),
                    mask_prob=settings.mask_feature_prob,
                    mask_length=min(settings.mask_feature_length, bins),
                    min_masks=settings.mask_feature_min_masks,
                )[0]
        times_BF, bins_BM = masked.to(device, non_blocking=True).split([frames, bins], dim=1)
        features_BMF.masked_fill_(times_BF[:, None] | bins_BM[:, :, None], 0)


def change_speed(samples_S: NDArray[np.float32], speed: float) -> NDArray[np.float32]:
    """Play faster (above 1) or slower; the pitch changes too."""
    if speed == 1.0 or not len(samples_S):
        return samples_S
    changed: NDArray[np.float32] = soxr.resample(samples_S, SAMPLE_RATE_HZ * speed, SAMPLE_RATE_HZ)
    return changed[: round(MAX_DURATION_S * SAMPLE_RATE_HZ)].astype(np.float32, copy=False)


def add_noise(samples_S: NDArray[np.float32], snr_db: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Add white, pink or brown noise at a ratio of powers, in dB."""
    power = float(np.mean(np.square(samples_S, dtype=np.float64))) if len(samples_S) else 0.0
    if power == 0.0:
        return samples_S
    exponent = random.choice(_EXPONENTS)
    spectrum = np.fft.rfft(random.standard_normal(len(samples_S)))
    frequencies = np.arange(len(spectrum), dtype=np.float64)
    frequencies[0] = 1.0
    noise_S = np.fft.irfft(spectrum / frequencies**exponent, len(samples_S))
    scale = np.sqrt(power / 10 ** (snr_db / 10) / max(1e-20, float(np.mean(noise_S**2))))
    noisy: NDArray[np.float32] = (samples_S + scale * noise_S).astype(np.float32)
    return noisy


def change_volume(samples_S: NDArray[np.float32], gain_db: float) -> NDArray[np.float32]:
    """Make louder or softer, in dB, but not beyond full scale: nothing is clipped that was not."""
    peak = float(np.abs(samples_S).max()) if len(samples_S) else 0.0
    gain = min(10 ** (gain_db / 20), max(1.0, 1 / peak) if peak else 1.0)
    return samples_S * np.float32(gain)
