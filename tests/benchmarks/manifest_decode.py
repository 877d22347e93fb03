"""What the builder's full check of audio costs beside a plain loop that decodes with soundfile and does no more.

    python tests/benchmarks/manifest_decode.py [--clips 300] [--seconds 5] [--turns 5]

Both run in one process on the same files, in turn; the median of the turns counts. Prints clips per second,
and the ratio of the two; 1.00 would mean that the checks cost nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from jobs.manifest.examine import Limits, Sound, examine
from jobs.manifest.row import Row
from service.spec.sections import DataConfig

FORMS = {
    "WAV 16-bit": ("wav", "WAV", "PCM_16", 16_000),
    "FLAC": ("flac", "FLAC", "PCM_16", 16_000),
    "FLAC 48 kHz": ("flac", "FLAC", "PCM_16", 48_000),
    "MP3": ("mp3", "MP3", "MPEG_LAYER_III", 16_000),
    "Opus": ("opus", "OGG", "OPUS", 16_000),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    limits = Limits.of(DataConfig(), decode=True)
    print(f"{'form':<12} {'plain clips/s':>14} {'checked':>9} {'ratio':>6} {'checked hours of audio per hour':>34}")
    with tempfile.TemporaryDirectory() as place:
        for name, (suffix, container, subtype, rate_hz) in FORMS.items():
            paths = [str(Path(place) / f"{number}.{suffix}") for number in range(options.clips)]
            generator = np.random.default_rng(0)
            for path in paths:
                samples = np.cumsum(generator.standard_normal(round(options.seconds * rate_hz)))
                samples = 0.3 * samples / np.abs(samples).max()
                soundfile.write(path, samples, rate_hz, format=container, subtype=subtype)
            rows = [Row(path, path, "hello", "en", duration_s=options.seconds) for path in paths]

            def plain(paths: list[str] = paths) -> None:
                for path in paths:
                    soundfile.read(path, dtype="float32")

            def checked(rows: list[Row] = rows) -> None:
                for row in rows:
                    assert isinstance(examine(row, limits)[0][1], Sound)

            times: dict[Callable[[], None], list[float]] = {plain: [], checked: []}
            for _ in range(options.turns):
                for work, taken in times.items():
                    started = time.perf_counter()
                    work()
                    taken.append(time.perf_counter() - started)
            speeds = [options.clips / statistics.median(taken) for taken in times.values()]
            hours = speeds[1] * options.seconds
            print(f"{name:<12} {speeds[0]:>14,.0f} {speeds[1]:>9,.0f} {speeds[1] / speeds[0]:>6.2f} {hours:>34,.0f}")


if __name__ == "__main__":
    main()
