"""How a run's clips become features, and which stay decoded: what `data.keep_audio_gb` means."""

from __future__ import annotations

from typing import Any

import torch

from jobs.batches import Features
from jobs.fast.encoder_outputs import SplitOutputs
from jobs.fast.kept_audio import KeptAudio
from jobs.fast.log_mel import LogMel
from jobs.fast.places import share_of_memory
from service.spec.counted import counted
from service.spec.job import JobSpec


def make_audio(spec: JobSpec) -> KeptAudio:
    """Somewhere to keep decoded clips, as the spec says; nothing is taken before a clip is kept."""
    return KeptAudio(*share_of_memory(spec.data.keep_audio_gb))


class Clips:
    """The clips of one run.

    Args:
        spec: the run's.
        audio: where decoded clips are kept.
        extractor: the checkpoint's feature extractor.
        device: where features are wanted.
        again: the splits that are heard more than once, by the name of their file.
    """

    def __init__(self, spec: JobSpec, audio: KeptAudio, extractor: Any, device: torch.device, again: set[str]) -> None:
        self._log_mel = LogMel(extractor, device, fast=spec.engine.fast_features)
        self._audio, self._again, self._told = audio, again, False

    def features(self, split: str, outputs: SplitOutputs | None = None) -> Features:
        """How a split's rows become features.

        Args:
            split: the name of its file.
            outputs: its encoder outputs: clips whose outputs are kept are not heard again.
        """
        kept = self._audio.of(split) if split in self._again and outputs is None else None
        return Features(self._log_mel, kept)

    def report(self) -> str:
        """What there was no room for, in words; empty: there was room, or it was said before."""
        if self._told or not (self._audio.limit and self._audio.turned_away):
            return ""
        self._told = True
        kept = f"{counted(self._audio.clips, 'clip is', 'clips are')} kept decoded in main memory"
        kept += f" ({self._audio.bytes / 1e9:.2f} GB)"
        return f"data.keep_audio_gb: {kept}; for more there is no room, and they are decoded whenever they are heard"
