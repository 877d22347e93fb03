"""A decoder-only search of 1, 4 and 16 trials: ours, over one base, beside one plain run after the other.

    python tests/benchmarks/search_together.py [--shape nano] [--trials 1 4 16] [--steps 48] [--epochs 3] [--batch 4]
        [--turns 1]

Plain: Seq2SeqTrainer with PEFT (plain.py), as it comes and tuned, for one trial of each kind in the search, times the
number of trials of that kind: they do nothing but wait for each other. Ours: `jobs.search.shared`, trials in threads of
this process, whole trainings with their checkpoints and last evaluation by loss, which the plain runs have not. Same
clips, clips per step, steps, epochs, learning rate, precision (float32 on a CPU, bf16 on a GPU). Loading counts on both
sides: ours loads the base once. Prints JSON: ratios of the plain sides' seconds to ours, seconds, losses, and
`equality`: the largest difference of a trial's mean loss from that of its configuration trained alone by our engine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ours
import plain
from bases import SHAPES, default_shape, write_base, write_clips
from measured import averaged, command, machine, peak_memory

from jobs.search.runner import TrialRun
from jobs.search.shared.engine import SharedEngine
from service.spec.job import JobSpec
from service.storage import Storage

SECONDS = 5.0


def recipes(count: int) -> list[plain.Recipe]:
    """Trials of four kinds in turn, LoRA and DoRA, of two ranks."""
    kinds = [plain.Recipe(rank, dora, frozen_encoder=True) for rank in (8, 16) for dora in (False, True)]
    return [kinds[index % len(kinds)] for index in range(count)]


def together(specs: list[JobSpec], data: Storage) -> tuple[float, list[float], int]:
    """All trials at once: seconds, each one's mean loss, and the most memory."""
    losses, failures = [0.0] * len(specs), []
    with peak_memory() as peak:
        began = time.perf_counter()
        engine = SharedEngine(specs[0], None)

        def go(index: int) -> None:
            try:
                run = TrialRun(specs[index], Storage(specs[index].root), data, None)
                events = engine.events(run, lambda: False)
                seen = [event["loss"] for event in events if event["event"] == "step"]
                losses[index] = sum(seen) / len(seen)
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=go, args=(index,)) for index in range(len(specs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
    if failures:
        raise failures[0]
    return seconds, losses, peak[0]


def measure(shape: str, trials: list[int], steps: int, epochs: int, batch: int, turns: int) -> dict[str, Any]:
    """Run all sides; see the module. `steps` are those of all epochs."""
    ran: dict[str, dict[Any, list[dict[str, Any]]]] = {
        name: defaultdict(list) for name in ("plain", "plain_tuned", "ours")
    }
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-bench-") as scratch:
        folder = Path(scratch)
        base = write_base(folder, shape)
        clips = write_clips(folder / "clips", steps // epochs * batch + ours.HELD_OUT, SECONDS)
        manifest = ours.write_manifest(folder / "manifest", clips)
        rows = clips[: -ours.HELD_OUT]
        alone = {}
        for recipe in recipes(4):
            spec = ours.job(base, manifest, folder / f"alone-{recipe.rank}-{recipe.dora}", recipe, batch, epochs)
            alone[recipe] = ours.train(spec, ours.prepared(spec, folder / "data")).loss
        for turn in range(turns):
            for name, tuned in (("plain", False), ("plain_tuned", True)):
                for recipe in recipes(4):
                    made = plain.train(base, rows, recipe, steps=steps, batch=batch, tuned=tuned)
                    ran[name][recipe].append(vars(made))
            for count in trials:
                wanted = recipes(count)
                specs = [
                    ours.job(base, manifest, folder / f"{turn}/{count}/{index}", recipe, batch, epochs)
                    for index, recipe in enumerate(wanted)
                ]
                seconds, losses, peak = together(specs, Storage(str(folder / "data")))
                apart = max(abs(loss - alone[recipe]) for loss, recipe in zip(losses, wanted, strict=True))
                ran["ours"][count].append({"seconds": seconds, "losses": losses, "peak": peak, "apart": apart})
    found: dict[str, Any] = {
        name: {key: averaged(each) for key, each in of_side.items()} for name, of_side in ran.items()
    }
    ratios = {
        f"search_{count}_trials{name.removeprefix('plain').replace('_', '_over_')}": round(
            sum(found[name][recipe]["seconds"] for recipe in recipes(count)) / found["ours"][count]["seconds"], 2
        )
        for name in ("plain", "plain_tuned")
        for count in trials
    }
    for name in ("plain", "plain_tuned"):
        found[name] = {
            f"rank {recipe.rank}, {'DoRA' if recipe.dora else 'LoRA'}": ran for recipe, ran in found[name].items()
        }
    equality = max(turn["apart"] for of_count in ran["ours"].values() for turn in of_count)
    return {
        "ratios": ratios,
        "equality": {"trial_loss_apart": equality},
        "shape": shape,
        "steps": steps,
        "epochs": epochs,
        "runs": found,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default=default_shape())
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    sizes = options.steps, options.epochs, options.batch, options.turns
    found = measure(options.shape, options.trials, *sizes)
    print(json.dumps({"command": command()} | machine() | found, indent=2))


if __name__ == "__main__":
    main()
