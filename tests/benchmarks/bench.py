"""All benchmarks of the fast engine in one go, each with both of its sides: `make bench`.

    python tests/benchmarks/bench.py [--shape nano] [--only single search]

With nano on a CPU, with random weights of large-v3-turbo's shape on a GPU. Prints a table of ratios: how many times as
long the other side took and, for `..._over_...`, how many times the time of what is named last. On a CPU they are of
means of two turns of each side; on a GPU those of `single` are of steps alone. Writes all to
tests/benchmarks/results/<device>.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import encoder_kept
import evaluation
import log_mel
import search_together
import single
import torch
import workers
from bases import SHAPES, default_shape
from measured import command, machine

from jobs.model import quiet_libraries

RESULTS = Path(__file__).parent / "results"


def parts(shape: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by name."""
    gpu = torch.cuda.is_available()
    # The GPU machines that we measure on have no Ray, and one GPU.
    growth = {} if gpu else {"workers": lambda: workers.measure(shape, 12, 8)}
    of_single = single.ON_GPU if gpu else {"steps": 16, "full_steps": 48, "short_batch": 12, "full_batch": 2}
    of_encoder = encoder_kept.ON_GPU if gpu else {"clips": 16, "batch": 4}
    turns = 1 if gpu else 2  # of all sides, one after the other: CPUs are shared
    return {
        "single": lambda: single.measure(shape, turns=turns, **of_single),
        "adapters": lambda: adapters.measure("turbo" if gpu else "nano", 15, 16, 0.0, 4),
        "search": lambda: search_together.measure(shape, [1, 4, 16], 48, 3, 16 if gpu else 4, turns),
        "evaluation": lambda: evaluation.measure(shape, 256 if gpu else 64, 3.0, 64, turns),
        "encoder_kept": lambda: encoder_kept.measure(shape if gpu else "narrow", epochs=3, turns=turns, **of_encoder),
        "log_mel": lambda: log_mel.measure(80 if shape != "turbo" else 128, 16, 5),
    } | growth


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default=default_shape())
    parser.add_argument("--only", nargs="+", help="these parts; nothing is written")
    options = parser.parse_args()
    quiet_libraries()
    runs: dict[str, Any] = {}
    for name, measure in parts(options.shape).items():
        if options.only and name not in options.only:
            continue
        began = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        runs[name] = measure()
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    ratios: dict[str, float] = {}
    for run in runs.values():
        ratios |= run["ratios"]
    width = max(map(len, ratios))
    for name, ratio in ratios.items():
        print(f"{name:<{width}}  {ratio:8.2f}")
    result = {
        "command": command(),
        **machine(),
        "shape": options.shape,
        "ratios": ratios,
        "mfu": runs.get("single", {}).get("mfu"),
        "equality": {name: run["equality"] for name, run in runs.items() if "equality" in run},
        "runs": runs,
    }
    if not options.only:
        path = RESULTS / (re.sub(r"[^a-z0-9]+", "_", str(result["device"]).lower()).strip("_") + ".json")
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"all of it: {path}")


if __name__ == "__main__":
    main()
