"""Our side of the benchmarks: whole trials of the engine, with checkpoints and a last evaluation by loss, which the
plain side has not; without Ray."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import torch
from bases import Clip
from measured import Pace, peak_memory
from plain import EVERYWHERE, Ran, Recipe

from jobs.prepare import prepare
from jobs.stopping import StopSignals
from jobs.train.here import train_here
from service.spec.job import JobSpec
from service.storage import Storage

HELD_OUT = 2


def write_manifest(folder: Path, clips: list[Clip]) -> Path:
    """train.csv, and val.csv of the last HELD_OUT clips, for the evaluation that ends a training."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", clips[:-HELD_OUT]), ("val", clips[-HELD_OUT:])):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "text", "language"), *rows])
    return folder


def job(
    base: Path, manifest: Path, outdir: Path, recipe: Recipe, batch: int, epochs: int = 1, **sections: dict[str, Any]
) -> JobSpec:
    """Epochs over the clips, in the plain side's terms."""
    training = {
        "base_model": str(base),
        "train_csv": str(manifest / "train.csv"),
        "val_csv": str(manifest / "val.csv"),
        "outdir": str(outdir),
        "freeze_encoder": recipe.frozen_encoder,
        "lora_target_modules": EVERYWHERE,
        "lora_r": recipe.rank,
        "lora_alpha": 2 * recipe.rank,
        "lora_dropout": 0.0,
        "use_dora": recipe.dora,
        "lr": recipe.lr,
        "warmup_ratio": 0.0,
        "per_dev_batch": batch,
        "grad_accum": 1,
        "eval_steps": 10_000,
        "save_steps": 10_000,
        "logging_steps": 1,  # so that what a step tells is its own loss, not the mean since the last that was logged
        "epochs": epochs,
        "merge_lora": False,
    }
    settings: dict[str, dict[str, Any]] = {
        "training": training,
        "resources": {"workers": 0} if not torch.cuda.is_available() else {},
        "evaluation": {"metric": "loss"},
        "engine": {"report_to": [], "threads": torch.get_num_threads()},
        "data": {"check": "header"},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    return JobSpec.model_validate(settings)


def prepared(spec: JobSpec, folder: Path) -> Storage:
    """The rows of a job, checked once for all that are trained on them, as a search does."""
    splits = {"train": str(spec.training.train_csv), "val": str(spec.training.val_csv)}
    prepare(spec, str(folder), splits, spec.training.base_model)
    return Storage(str(folder))


def train(spec: JobSpec, data: Storage) -> Ran:
    """One training; loading the base model counts."""
    losses: list[float] = []
    pace = Pace()

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])
            pace.tell(event["step"], event["steps"])

    with peak_memory() as peak:
        began = time.perf_counter()
        train_here(spec, Storage(spec.root), data, None, hear, StopSignals(), trial=True)
        seconds = time.perf_counter() - began
    return Ran(seconds, sum(losses) / len(losses), peak[0], pace.step_seconds)
