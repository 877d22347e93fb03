"""Log-mel features of our own beside those of transformers' extractor, on clips of 5 s and on full windows.

    python tests/benchmarks/log_mel.py [--clips 16] [--rounds 5] [--threads 1] [--mel-bins 128]

Both start from samples in memory and end with features on the device: the GPU where there is one. Prints JSON:
milliseconds per clip (the median of the rounds), their ratios, and the largest difference of a feature.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measured import command, device, machine, wait
from transformers import WhisperFeatureExtractor

from jobs.audio import SAMPLE_RATE_HZ
from jobs.fast.log_mel import LogMel

Side = Callable[[list[np.ndarray]], torch.Tensor]


def measure(mel_bins: int, clips: int, rounds: int) -> dict[str, Any]:
    """Both sides, of 5 s and of 30 s; see the module."""
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    theirs, ours = LogMel(extractor, fast=False), LogMel(extractor, device())
    sides: list[Side] = [lambda samples: theirs(samples).to(device()), ours]
    found: dict[str, Any] = {"ratios": {}, "equality": {}, "runs": {}, "clips": clips, "mel_bins": mel_bins}
    for seconds in (5, 30):
        samples = _clips(clips, seconds)
        theirs_s, ours_s = _alternate(sides, samples, rounds)
        found["ratios"][f"log_mel_{seconds}_s"] = round(theirs_s / ours_s, 2)
        found["equality"][f"{seconds}_s"] = float((theirs(samples).to(device()) - ours(samples)).abs().max())
        found["runs"][f"{seconds}_s"] = {
            "transformers_ms_per_clip": round(1000 * theirs_s / clips, 3),
            "ours_ms_per_clip": round(1000 * ours_s / clips, 3),
        }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("clips", 16), ("rounds", 5), ("threads", 1), ("mel-bins", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.mel_bins, options.clips, options.rounds)
    print(json.dumps({"command": command()} | machine() | found, indent=2))


def _clips(count: int, seconds: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    swell = np.sin(np.arange(seconds * SAMPLE_RATE_HZ) / 3000) ** 2
    return [(0.1 * generator.standard_normal(len(swell)) * swell).astype(np.float32) for _ in range(count)]


def _alternate(sides: list[Side], clips: list[np.ndarray], rounds: int) -> list[float]:
    """Seconds of each side: the median of rounds in which they take turns, after one that is not counted."""
    took: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, times in zip(sides, took, strict=True):
            began = time.perf_counter()
            side(clips)
            wait()
            times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) for times in took]


if __name__ == "__main__":
    main()
