"""`data.dataset`: the manifests of a job made from a dataset, before the job looks at them like at any others."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.manifest.build import build
from jobs.manifest.examine import Limits
from jobs.manifest.sources import SourceOptions
from jobs.manifest.write import TRAIN, VAL
from jobs.model import at_hand, load_prompter, quiet_libraries
from service.spec.job import JobSpec

REPORT_EVERY = 1_000


def build_from_dataset(spec: JobSpec, folder: Path, progress: Callable[[int], None]) -> dict[str, Any]:
    """Make train.csv and val.csv from the spec's dataset.

    Args:
        spec: with `data.dataset`.
        folder: takes the manifests and the audio that is inside the dataset's tables.
        progress: called with the rows done.

    Returns:
        {"manifests": CSV by split name, "report": what was built}.

    Raises:
        InputError: the dataset cannot be had.
        ManifestError: nothing usable is left on one of the sides.
    """
    quiet_libraries()
    data = spec.data
    report = build(
        at_hand(str(data.dataset), "data.dataset"),
        folder,
        kind="dataset",
        options=SourceOptions(
            language=spec.training.language, text_column=data.text_column, dataset_config=data.dataset_config
        ),
        val_ratio=data.val_ratio,
        seed=spec.training.seed,
        group=data.group,
        limits=Limits.of(data, decode=True),
        prompter=load_prompter(spec.training.base_model),
        # A Ray worker starts no processes of its own: Ray would not know of the CPUs that they take.
        processes=1,
        overwrite=True,  # the folder is the job's own
        progress=lambda done, total: progress(done) if done % REPORT_EVERY == 0 else None,
    )
    return {
        "manifests": {"train": str(folder.absolute() / TRAIN), "val": str(folder.absolute() / VAL)},
        "report": asdict(report),
    }


def anchor(folder: Path) -> None:
    """Make the manifests' paths to audio outside of their folder absolute, so that the folder may be moved."""
    for name in (TRAIN, VAL):
        with open(folder / name, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
        for row in rows:
            if row["path"].startswith("../"):
                row["path"] = str((folder / row["path"]).resolve())
        with open(folder / name, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
