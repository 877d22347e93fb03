"""Rows per second and peak memory of `manifest build` at 10^3 to 10^6 rows.

    python tests/benchmarks/manifest_rows.py [--rows 1000 10000 100000 1000000] [--processes 2] [--folder DIR]

A small set of clips is hard-linked under as many names; each build runs in a process of its own, whose resident memory
is read twenty times a second (its own, and the largest of the processes that decode for it). The names are the
transcripts, so duplicates are kept and audio may be on both sides; sentences may not, nor may one of the 997 speakers.
Prints a table and the ratio of each peak to the one at the fewest rows: flat memory means ratios near 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile

ROOT = Path(__file__).parents[2]
CLIPS = 64
SECONDS = 0.5
PER_FOLDER = 10_000

CHILD = """
import json, sys, time
from pathlib import Path
from jobs.manifest.build import build
from jobs.manifest.sources import SourceOptions
folder, out, processes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
started = time.monotonic()
pattern = r"(?P<speaker>s[0-9]+)-(?P<text>.+)"
report = build(folder, out, kind="names", options=SourceOptions(pattern=pattern), group="speaker", allowed=("audio",),
               keep_duplicates=True, processes=processes)
seconds = time.monotonic() - started
print(json.dumps({"rows": report.train + report.val, "val": report.val, "rejected": report.rejected,
                  "seconds": seconds}))
"""


def make_folder(folder: Path, rows: int) -> None:
    """Link a few clips under `rows` names, ten thousand to a folder."""
    originals = folder / "originals"
    originals.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(CLIPS):
        samples = 0.1 * generator.standard_normal(round(16_000 * SECONDS)).astype(np.float32)
        soundfile.write(originals / f"{number}.flac", samples, 16_000)
    audio = folder / "audio"
    for number in range(rows):
        place = audio / f"{number // PER_FOLDER:04}"
        if number % PER_FOLDER == 0:
            place.mkdir(parents=True)
        # A file system allows some 65,000 links to a file.
        os.link(originals / f"{number % CLIPS}.flac", place / f"s{number % 997}-sentence_{number}.flac")


def measure(folder: Path, rows: int, processes: int) -> dict[str, float]:
    """Build once, in a process of its own."""
    arguments = [sys.executable, "-c", CHILD, str(folder / "audio"), str(folder / "out"), str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = {"self_mib": 0.0, "child_mib": 0.0}
    watcher = threading.Thread(target=watch, args=(child.pid, peaks))
    watcher.start()
    output, _ = child.communicate()
    watcher.join()
    result: dict[str, float] = json.loads(output) | peaks
    assert result["rows"] == rows, result
    assert result["rejected"] == 0
    return result


def watch(pid: int, peaks: dict[str, float]) -> None:
    """Follow the memory that a process and the largest of its descendants hold, until it ends."""
    try:
        parent = psutil.Process(pid)
        while True:
            peaks["self_mib"] = max(peaks["self_mib"], parent.memory_info().rss / 2**20)
            for child in parent.children(recursive=True):
                try:
                    peaks["child_mib"] = max(peaks["child_mib"], child.memory_info().rss / 2**20)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", help="where the links are made; a temporary folder by default")
    options = parser.parse_args()
    print(f"{'rows':>9} {'seconds':>9} {'rows/s':>8} {'peak MiB':>9} {'a worker':>9} {'x first':>8} {'val':>6}")
    first = None
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            started = time.monotonic()
            make_folder(Path(place), rows)
            linked = time.monotonic() - started
            found = measure(Path(place), rows, options.processes)
        first = first or found["self_mib"]
        print(
            f"{rows:>9,} {found['seconds']:>9.1f} {rows / found['seconds']:>8,.0f} {found['self_mib']:>9.0f} "
            f"{found['child_mib']:>9.0f} {found['self_mib'] / first:>8.2f} {found['val'] / rows:>6.1%}"
            f"   (linking took {linked:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
