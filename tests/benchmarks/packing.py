"""`data.packing` on and off: a LoRA training of nano each, on the demo's kind of speech, in one go.

    python tests/benchmarks/packing.py [--clips 200] [--epochs 8] [--batch 12]

Same utterances, steps, learning rate and seed; then `packed_as_long`, packed for as many more epochs as fit in the time
of the training of single clips. What comes out is heard on what was not trained on: single clips, and recordings of up
to 28 s that are joined from them. Prints JSON: the ratio of seconds at equal steps, mean losses, and word error rates
of the base and of the trainings on short and on long audio.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import ours
import plain
from bases import Clip, join_clips, write_base
from evaluation import Rows, scorer_of
from measured import command, machine

from jobs.adapter import load_adapter
from jobs.demo.make_speech import make_speech
from jobs.evaluate import evaluate
from jobs.manifest.build import build
from jobs.manifest.rows import read_rows
from jobs.model import load_whisper
from service.spec.sections import EvaluationConfig

LONG_S = 28.0
LR = 1e-2
"""The demo's."""


def measure(clips: int, epochs: int, batch: int) -> dict[str, Any]:
    """Train both ways and score; see the module."""
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-bench-") as scratch:
        folder = Path(scratch)
        base, manifest = write_base(folder, "nano"), folder / "manifest"
        make_speech(folder / "speech", clips=clips, seed=5)
        build(folder / "speech", manifest, val_ratio=0.25)
        held_out = [(Path(row.path), row.text, row.language) for row in read_rows(str(manifest / "val.csv"), "en")]
        english = [clip for clip in held_out if clip[2] == "en"]
        sets = {"short": english, "long": join_clips(folder / "long", english, len(english) // 8, LONG_S)}
        runs: dict[str, Any] = {"base": {"wer": _scores(base, None, sets)}}
        for name in ("packed", "single", "packed_as_long"):
            recipe, data, passes = plain.Recipe(lr=LR), {"packing": name != "single"}, epochs
            if name == "packed_as_long":
                passes = round(epochs * runs["single"]["seconds"] / runs["packed"]["seconds"])
            spec = ours.job(base, manifest, folder / name, recipe, batch, data=data, training={"epochs": passes})
            runs[name] = vars(ours.train(spec, ours.prepared(spec, folder / "data")))
            (last,) = (Path(spec.root) / "checkpoints").glob("checkpoint-*")
            runs[name] |= {"epochs": passes, "wer": _scores(base, last / "adapter", sets)}
    return {"ratios": {"packing": round(runs["single"]["seconds"] / runs["packed"]["seconds"], 2)}, "runs": runs}


def _scores(base: Path, adapter: Path | None, sets: dict[str, list[Clip]]) -> dict[str, float]:
    whisper = load_whisper(str(base))
    model = load_adapter(whisper.model, adapter) if adapter else whisper.model
    found = {}
    for name, clips in sets.items():
        rows, settings = Rows(clips, LONG_S), EvaluationConfig(max_new_tokens=200)
        scorer = scorer_of(whisper.processor)
        _, summary = evaluate(model, whisper.processor, rows, settings, scorer=scorer, multilingual=True, bootstrap=0)
        found[name] = round(summary["wer"], 4)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("clips", 200), ("epochs", 8), ("batch", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    found = measure(options.clips, options.epochs, options.batch)
    print(json.dumps({"command": command()} | machine() | found, indent=2))


if __name__ == "__main__":
    main()
