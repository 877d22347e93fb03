"""The process that opens an artifact in its own runtime and transcribes clips: `python -m jobs.export.listen TASK`.

A process of its own, since a runtime that is given a broken file may end the process that it is in.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from jobs.export.runtimes import RUNTIMES, SAMPLE_RATE_HZ, Decoding, runtime_version

TASK, CLIPS = "task.json", "clips.npy"


def main(folder: Path) -> None:
    """Do the task in a folder; what it finds goes to stdout, a JSON object per line.

    task.json: {"family", "model", "decoding", "modes", "clips": [{"language", "samples"}]}; clips.npy: all clips' audio
    one after the other, float32.
    """
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    # Runtimes, and the C libraries below them, print as they please: keep our own way out to ourselves.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    audio = np.load(folder / CLIPS, mmap_mode="r")

    def say(**what: Any) -> None:
        print(json.dumps(what, ensure_ascii=False), file=out, flush=True)

    runtime = RUNTIMES[task["family"]][0](Path(task["model"]), Decoding(**task["decoding"]))
    say(opened=runtime.compute_type, version=runtime_version(task["family"]))
    for mode in task["modes"]:
        transcribe = getattr(runtime, mode)
        end = 0
        for index, clip in enumerate(task["clips"]):
            begin, end = end, end + clip["samples"]
            samples = np.array(audio[begin:end])
            started = time.monotonic()
            text = transcribe(samples, clip["language"]).strip()
            say(mode=mode, clip=index, text=text, seconds=time.monotonic() - started)
    say(done=True, seconds_of_audio=len(audio) / SAMPLE_RATE_HZ)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
