"""A decoder-only search of 1, 4 and 16 trials: ours, over one base, beside one plain run after the other.

    python tests/benchmarks/search_together.py [--trials 1 4 16] [--clips 24] [--steps 12] [--batch 4]

Plain: transformers' Seq2SeqTrainer with PEFT (plain.py), as it comes and tuned, for one trial of each kind in the
search, times the number of trials of that kind: they do nothing but wait for each other. Ours: `jobs.search.shared`,
trials in threads of this process, whole trainings with their last evaluation by loss and their checkpoints, which the
plain runs have not. Same clips, clips per step, steps, learning rate, precision (float32 on CPU, bf16 on a GPU).
Loading counts on both sides: ours loads the base once. Nano Whisper, with its real window of 30 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from plain import Ran, train

from jobs.demo.make_speech import make_speech
from jobs.demo.nano import write_nano_whisper
from jobs.manifest.build import build
from jobs.manifest.rows import read_rows
from jobs.prepare import prepare
from jobs.search.runner import TrialRun
from jobs.search.shared.engine import SharedEngine
from service.spec.job import JobSpec
from service.storage import Storage

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
DECODER = r".*decoder.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
LR = 1e-3


def points(count: int) -> list[dict[str, Any]]:
    """Trials of four kinds in turn, LoRA and DoRA, of two ranks."""
    kinds = [{"lora_r": rank, "lora_alpha": 2 * rank, "use_dora": dora} for rank in (8, 16) for dora in (False, True)]
    return [kinds[index % len(kinds)] for index in range(count)]


def ours(base: Path, data: Path, folder: Path, count: int, steps: int, batch: int) -> Ran:
    """All trials at once."""
    began = time.perf_counter()
    specs = []
    for index, point in enumerate(points(count)):
        training = {
            "base_model": str(base),
            "train_csv": str(data / "train.csv"),
            "val_csv": str(data / "val.csv"),
            "outdir": str(folder / f"t{index}"),
            "freeze_encoder": True,
            "lora_target_modules": TARGETS,
            "lora_dropout": 0.0,
            "lr": LR,
            "warmup_ratio": 0.0,
            "per_dev_batch": batch,
            "grad_accum": 1,
            "eval_steps": 10_000,
            "save_steps": 10_000,
            "epochs": 1,
        }
        specs.append(
            JobSpec.model_validate(
                {
                    "training": training | point,
                    "resources": {"workers": 0},
                    "evaluation": {"metric": "loss"},
                    "engine": {"report_to": [], "threads": torch.get_num_threads()},
                }
            )
        )
    engine, losses, failures = SharedEngine(specs[0], None), [0.0] * count, []

    def go(index: int) -> None:
        seen = []
        try:
            run = TrialRun(specs[index], Storage(specs[index].root), Storage(str(folder / "data")), None)
            for event in engine.events(run, lambda: False):
                if event["event"] == "step":
                    seen.append(event["loss"])
            assert len(seen) == steps, f"{len(seen)} steps"
            losses[index] = sum(seen) / len(seen)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=go, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Ran(time.perf_counter() - began, sum(losses) / count)


def main() -> None:
    """Run both sides, and print their ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-bench-") as scratch:
        folder = Path(scratch)
        write_nano_whisper(folder / "nano")
        make_speech(folder / "speech", clips=options.clips, seed=3)
        build(folder / "speech", folder / "manifest", val_ratio=0.1)
        rows = list(read_rows(str(folder / "manifest/train.csv"), "en"))[: options.steps * options.batch]
        cut(folder, options.steps * options.batch)
        clips = [(Path(row.path), row.text, row.language) for row in rows]
        found: dict[str, Any] = {"plain": {}, "plain_tuned": {}, "ours": {}}
        for name, tuned in (("plain", False), ("plain_tuned", True)):
            for dora in (False, True):
                ran = train(
                    str(folder / "nano"), clips, steps=options.steps, batch=options.batch, lr=LR, rank=16, alpha=32,
                    dora=dora, dropout=0.0, targets=DECODER, frozen_encoder=True, tuned=tuned,
                )  # fmt: skip
                found[name]["dora" if dora else "lora"] = vars(ran)
        for count in options.trials:
            runs = folder / f"runs-{count}"
            spec = {"train_csv": str(folder / "manifest/train.csv"), "val_csv": str(folder / "manifest/val.csv")}
            job = JobSpec.model_validate(
                {"training": spec | {"base_model": str(folder / "nano"), "outdir": str(runs / "data")}}
            )
            prepare(job, job.root, {"train": spec["train_csv"], "val": spec["val_csv"]}, str(folder / "nano"))
            found["ours"][str(count)] = vars(
                ours(folder / "nano", folder / "manifest", runs, count, options.steps, options.batch)
            )
    ratios = {}
    for name in ("plain", "plain_tuned"):
        for count in options.trials:
            kinds = [point["use_dora"] for point in points(count)]
            separate = sum(found[name]["dora" if dora else "lora"]["seconds"] for dora in kinds)
            ratios[f"search_{count}_trials_over_{name}"] = round(separate / found["ours"][str(count)]["seconds"], 2)
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    print(json.dumps({"device": device, "versions": packages, "ratios": ratios, "runs": found}, indent=2))


def cut(folder: Path, rows: int) -> None:
    """Keep so many rows of the training set: whole steps alone."""
    path = folder / "manifest/train.csv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) > rows, "more --clips"
    path.write_text("".join(lines[: rows + 1]), encoding="utf-8")


if __name__ == "__main__":
    main()
