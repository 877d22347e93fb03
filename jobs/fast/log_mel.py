"""Log-mel features on the model's device, of the samples that there are.

The reference is transformers' WhisperFeatureExtractor, which pads every clip with silence to the whole window and
transforms all of that on the CPU. Here the frames behind a clip's end are not computed: their value follows from the
loudest one. The rest are transformers' operations in its order, so that on the CPU the features are its own to the bit.

Legend: B clips, S samples, M mel bins, F frames of a whole window (3000), N frequencies of the transform.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor

from jobs.audio import SAMPLE_RATE_HZ
from jobs.device import device_of
from service.spec.job import JobSpec

GPU_CLIPS = 16
"""Clips of which a GPU makes the features at once: each takes about 14 MB on the way, of a whole window."""

GPU_FRAMES = 250
"""A GPU computes a multiple of so many frames: the transform has a plan, and memory, for each length it has seen."""

LOWEST = 1e-10
"""The power that silence counts as."""


class LogMel:
    """Makes features as a checkpoint's feature extractor does; threads may share it.

    On the CPU each clip is computed by itself, so that its features never depend on the others of its batch; on a GPU
    several at once.

    Args:
        extractor: a WhisperFeatureExtractor.
        device: where the features are wanted; None: the CPU.
        fast: False: the extractor itself makes them, on the CPU. So does one that has been changed (dither, padding).
    """

    def __init__(self, extractor: Any, device: torch.device | None = None, *, fast: bool = True) -> None:
        self._extractor, self.device = extractor, device or torch.device("cpu")
        self._fast = fast and _is_plain(extractor)
        self._hop, self._reach = int(extractor.hop_length), int(extractor.n_fft) // 2
        self._filters_MN = torch.tensor(extractor.mel_filters, dtype=torch.float32, device=self.device).T
        self._window = torch.hann_window(extractor.n_fft, device=self.device)

    def __call__(self, clips: list[NDArray[np.float32]]) -> Tensor:
        """Log-mel features of B clips, each padded with silence to the window: float32 (B, M, F), on the device unless
        the extractor itself makes them."""
        # Whoever calls may be under autocast, which would round the filters' product.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), torch.autocast("cpu", enabled=False):
            if not self._fast:
                found: Tensor = self._extractor(clips, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
                return found
            shape = (len(clips), self._extractor.feature_size, self._extractor.nb_max_frames)
            features_BMF = torch.empty(shape, device=self.device)
            together = GPU_CLIPS if self.device.type == "cuda" else 1
            for first in range(0, len(clips), together):
                self._fill(features_BMF[first : first + together], clips[first : first + together])
            return features_BMF

    def _fill(self, features_BMF: Tensor, clips: list[NDArray[np.float32]]) -> None:
        """Compute the frames that any of these clips reaches into; the others are silence in all of them."""
        window, heard = self._extractor.n_samples, max(map(len, clips))
        step = GPU_FRAMES if self.device.type == "cuda" else 1
        frames = min(features_BMF.shape[2], -(-(heard + self._reach) // (self._hop * step)) * step)
        end = (frames - 1) * self._hop + self._reach  # the last frame is centred `reach` samples before it
        waves_BS = self._padded(clips, min(window, max(end, heard, self._reach + 1))).to(self.device, non_blocking=True)
        # The window is mirrored at both of its ends: at a frame that looks beyond, and nowhere else.
        mirrored_BS = F.pad(waves_BS[None], (self._reach, self._reach if end > window else 0), mode="reflect")[0]
        spectrum_BNF = torch.stft(
            mirrored_BS, 2 * self._reach, self._hop, window=self._window, center=False, return_complex=True
        )
        power_BNF = (spectrum_BNF[..., :frames].abs() ** 2).contiguous()
        log_BMF = torch.clamp(self._filters_MN @ power_BNF, min=LOWEST).log10()
        floor_B11 = log_BMF.amax(dim=(1, 2), keepdim=True) - 8.0
        silence = torch.full_like(floor_B11, LOWEST).log10()
        features_BMF[..., :frames] = (torch.maximum(log_BMF, floor_B11) + 4.0) / 4.0
        features_BMF[..., frames:] = (torch.maximum(silence, floor_B11) + 4.0) / 4.0

    def _padded(self, clips: list[NDArray[np.float32]], size: int) -> Tensor:
        """Clips with zeros behind them (B, size), in memory that a GPU copies from by itself."""
        waves_BS = torch.empty((len(clips), size), pin_memory=self.device.type == "cuda")
        for wave_S, clip in zip(waves_BS.numpy(), clips, strict=True):
            part = clip[:size]
            wave_S[: len(part)] = part
            wave_S[len(part) :] = 0
        return waves_BS


def log_mel_of(spec: JobSpec, processor: Any) -> LogMel:
    """What makes a job's features, on the device that it computes on."""
    return LogMel(processor.feature_extractor, device_of(spec), fast=spec.engine.fast_features)


def _is_plain(extractor: Any) -> bool:
    """Whether an extractor does what this file does: nobody's own kind, no dither, silence behind the clip."""
    return (
        type(extractor) is WhisperFeatureExtractor
        and not extractor.dither
        and not extractor.padding_value
        and extractor.padding_side == "right"
        and extractor.n_fft % 2 == 0
        and extractor.n_samples > extractor.n_fft
        and extractor.n_samples % extractor.hop_length == 0
    )
