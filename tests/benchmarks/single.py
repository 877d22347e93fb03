"""One LoRA training in encoder and decoder, ours beside Seq2SeqTrainer with PEFT: clips of 5 s, and full windows.

    python tests/benchmarks/single.py [--shape nano] [--steps 6] [--full-steps 18] [--short-batch 12] [--full-batch 2]
        [--turns 1]

Same clips, utterances per step, steps, learning rate and precision (float32 on a CPU, bf16 on a GPU) on all sides, and
one process. Short clips are packed on our side (`data.packing`), so a step holds as many utterances in fewer windows;
`short_clips_unpacked` is ours without. Prints JSON: ratios of the plain sides' seconds to ours, seconds, mean losses,
peaks of memory and, on a GPU, the share of its peak (MFU) that the steps of full windows come to.

`ratios` are of whole runs on a CPU: loading counts on all sides, on ours a checkpoint and an evaluation by loss too. On
a GPU, where a step is short beside that, they are of the steps alone, without the first ones; there are more of them.
Both kinds are in `ratios_of`.
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
from measured import averaged, command, device, machine, mfu

SHORT_S, FULL_S = 5.0, 30.0
ON_GPU = {"steps": 40, "full_steps": 96, "short_batch": 48, "full_batch": 8}


def measure(shape: str, steps: int, full_steps: int, short_batch: int, full_batch: int, turns: int) -> dict[str, Any]:
    """Run all sides; see the module. `full_steps` are those of full windows."""
    recipe, found = plain.Recipe(), {}
    ratios: dict[str, dict[str, float]] = {"steps": {}, "whole_runs": {}}
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
                        for of, spent in (("steps", "step_seconds"), ("whole_runs", "seconds")):
                            ratio = round(sides[name][spent] / sides[mine][spent], 2)
                            ratios[of][f"single_{kind}{suffix}"] = ratio
    return {
        "ratios": ratios["steps" if device().type == "cuda" else "whole_runs"],
        "ratios_of": ratios,
        "mfu": mfu(shape, "lora", full_batch / found["full_windows"]["ours"]["step_seconds"]),
        "shape": shape,
        "runs": found,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default=default_shape())
    sizes = {"steps": 6, "full_steps": 18, "short_batch": 12, "full_batch": 2}
    for name, default in (sizes | (ON_GPU if device().type == "cuda" else {}) | {"turns": 1}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args()
    if min(options.steps, options.full_steps) < 2:
        parser.error("give 2 steps or more: the first one does not count")
    found = measure(options.shape, **{name: getattr(options, name) for name in (*sizes, "turns")})
    print(json.dumps({"command": command()} | machine() | found, indent=2))


if __name__ == "__main__":
    main()
