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

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from jobs.audio import SAMPLE_RATE_HZ
from jobs.fast.log_mel import LogMel

Side = Callable[[list[np.ndarray]], torch.Tensor]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("clips", 16), ("rounds", 5), ("threads", 1), ("mel-bins", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = WhisperFeatureExtractor(feature_size=options.mel_bins)
    theirs, ours = LogMel(extractor, fast=False), LogMel(extractor, device)
    sides: list[Side] = [lambda clips: theirs(clips).to(device), ours]
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {options.threads} thread(s)",
        "clips": options.clips,
        "mel_bins": options.mel_bins,
    }
    for seconds in (5, 30):
        clips = _clips(options.clips, seconds)
        found = _alternate(sides, clips, options.rounds, device)
        theirs_ms, ours_ms = (1000 * took / options.clips for took in found)
        report[f"{seconds}_s"] = {
            "transformers_ms_per_clip": round(theirs_ms, 3),
            "ours_ms_per_clip": round(ours_ms, 3),
            "ratio": round(theirs_ms / ours_ms, 2),
            "largest_difference": float((theirs(clips).to(device) - ours(clips)).abs().max()),
        }
    print(json.dumps(report, indent=2))


def _clips(count: int, seconds: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    swell = np.sin(np.arange(seconds * SAMPLE_RATE_HZ) / 3000) ** 2
    return [(0.1 * generator.standard_normal(len(swell)) * swell).astype(np.float32) for _ in range(count)]


def _alternate(sides: list[Side], clips: list[np.ndarray], rounds: int, device: torch.device) -> list[float]:
    """Seconds of each side: the median of rounds in which they take turns, after one that is not counted."""
    took: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, times in zip(sides, took, strict=True):
            began = time.perf_counter()
            side(clips)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) for times in took]


if __name__ == "__main__":
    main()
