"""One LoRA training in encoder and decoder, ours beside Seq2SeqTrainer with PEFT: clips of 5 s, and full windows.

    python tests/benchmarks/single.py [--shape nano] [--steps 6] [--full-steps 18] [--short-batch 12] [--full-batch 2]
        [--turns 1]

Same clips, utterances per step, steps, learning rate and precision (float32 on a CPU, bf16 on a GPU) on all sides, and
one process. Short clips are packed on our side (`data.packing`), so a step holds as many utterances in fewer windows;
`short_clips_unpacked` is ours without. Our side also checkpoints and evaluates by loss at its end. Prints JSON: ratios
of the plain sides' seconds to ours, seconds, mean losses, peaks of memory and, on a GPU, the share of its peak
(MFU) that full windows come to.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import ours
import plain
from bases import SHAPES, default_shape, write_base, write_clips
from measured import averaged, command, machine, mfu

SHORT_S, FULL_S = 5.0, 30.0


def measure(shape: str, steps: int, full_steps: int, short_batch: int, full_batch: int, turns: int) -> dict[str, Any]:
    """Run all sides; see the module. `full_steps` are those of full windows."""
    recipe, found, ratios = plain.Recipe(), {}, {}
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-bench-") as scratch:
        folder = Path(scratch)
        base = write_base(folder, shape)
        short = ("short_clips", SHORT_S, short_batch, steps)
        for kind, seconds, batch, count in (short, ("full_windows", FULL_S, full_batch, full_steps)):
            clips = write_clips(folder / kind, count * batch + ours.HELD_OUT, seconds)
            manifest = ours.write_manifest(folder / kind, clips)
            rows = clips[: -ours.HELD_OUT]
            ran: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for turn in range(turns):
                for name, tuned in (("plain", False), ("plain_tuned", True)):
                    ran[name].append(vars(plain.train(base, rows, recipe, steps=count, batch=batch, tuned=tuned)))
                packings = (True, False) if kind == "short_clips" else (False,)
                for packing in packings:
                    name = "ours" if packing is packings[0] else "ours_unpacked"
                    root = folder / kind / f"{name}-{turn}"
                    spec = ours.job(base, manifest, root, recipe, batch, data={"packing": packing})
                    ran[name].append(vars(ours.train(spec, ours.prepared(spec, folder / kind / "data"))))
            sides = {name: averaged(each) for name, each in ran.items()}
            found[kind] = sides | {"utterances": len(rows), "steps": count}
            for name in ("plain", "plain_tuned"):
                for mine in ("ours", "ours_unpacked"):
                    if mine in sides:
                        suffix = mine.removeprefix("ours") + name.removeprefix("plain").replace("_", "_over_")
                        ratios[f"single_{kind}{suffix}"] = round(sides[name]["seconds"] / sides[mine]["seconds"], 2)
    full = found["full_windows"]
    return {
        "ratios": ratios,
        "mfu": mfu(shape, "lora", full["utterances"] / full["ours"]["seconds"]),
        "shape": shape,
        "runs": found,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default=default_shape())
    for name, default in (("steps", 6), ("full-steps", 18), ("short-batch", 12), ("full-batch", 2), ("turns", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    sizes = options.steps, options.full_steps, options.short_batch, options.full_batch
    found = measure(options.shape, *sizes, options.turns)
    print(json.dumps({"command": command()} | machine() | found, indent=2))


if __name__ == "__main__":
    main()
