"""Growth over workers: one training by one Ray Train worker, and by two.

    python tests/benchmarks/workers.py [--shape nano] [--steps 24] [--batch 8]

A LoRA training in encoder and decoder, of clips of 5 s, as whole jobs on a local Ray cluster: the same clips, steps and
clips per step, of which each worker has its share. A worker has one CPU thread, or a GPU. Prints JSON: clips per second
as the jobs report them (of steps alone: no loading, no evaluation), their ratio, and how far apart the last losses are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ours
import plain
import torch
from bases import SHAPES, default_shape, write_base, write_clips
from measured import command, machine

SECONDS = 5.0


def measure(shape: str, steps: int, batch: int) -> dict[str, Any]:
    """Run both; see the module."""
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-bench-") as scratch:
        folder = Path(scratch)
        base = write_base(folder, shape)
        manifest = ours.write_manifest(
            folder / "manifest", write_clips(folder / "clips", steps * batch + ours.HELD_OUT, SECONDS)
        )
        for workers in (1, 2):
            resources = {"workers": workers} | ({} if torch.cuda.is_available() else {"cpus_per_worker": 1})
            spec = ours.job(
                base, manifest, folder / f"run-{workers}", plain.Recipe(), batch // workers,
                resources=resources, engine={"threads": None, "report_to": []},
            )  # fmt: skip
            file = folder / f"{workers}.json"
            file.write_text(spec.to_json(), encoding="utf-8")
            ran = subprocess.run([Path(sys.executable).with_name("whisper-jobs"), "run", file], capture_output=True)
            if ran.returncode:
                raise RuntimeError(ran.stderr.decode())
            found[workers] = json.loads((folder / f"run-{workers}/metrics.json").read_text())["training"]
    one, two = (found[workers]["clips_per_s"] for workers in (1, 2))
    losses = [found[workers]["history"][-1]["loss"] for workers in (1, 2)]
    return {
        "ratios": {"growth_2_workers": round(two / one, 2)},
        "equality": {"loss_apart": abs(losses[0] - losses[1])},
        "shape": shape,
        "runs": {"clips_per_s": {"1": one, "2": two}, "losses": losses},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default=default_shape())
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    found = measure(options.shape, options.steps, options.batch)
    print(json.dumps({"command": command()} | machine() | found, indent=2))


if __name__ == "__main__":
    main()
