"""What runs as a Ray task. Specs travel as JSON; heavy imports happen there, not in the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.artifacts import DATASET
from service.spec.checks import require_model
from service.spec.job import JobSpec
from service.storage import Storage


def check_hardware(spec: str) -> str:
    """The precision that a worker can train in; see `jobs.device.precision_of`.

    Raises:
        SpecError: it lacks what the spec asks for.
    """
    from jobs.device import precision_of

    return precision_of(JobSpec.model_validate_json(spec))


def build_dataset(spec: str, root: str, log: Any) -> dict[str, Any]:
    """See `jobs.manifest.from_spec.build_from_dataset`."""
    from jobs.manifest.from_spec import anchor, build_from_dataset

    def progress(rows: int) -> None:
        log.emit.remote({"event": "rows", "split": "dataset", "rows": rows})

    job, storage = JobSpec.model_validate_json(spec), Storage(root)
    if storage.is_local:
        return build_from_dataset(job, storage.local(DATASET), progress)
    with storage.new_folder(DATASET) as folder:
        built = build_from_dataset(job, folder, progress)
        anchor(folder)
    return built | {"manifests": {name: f"{DATASET}/{Path(path).name}" for name, path in built["manifests"].items()}}


def prepare_data(spec: str, root: str, splits: dict[str, str], model: str, log: Any) -> dict[str, Any]:
    """See `jobs.prepare.prepare`."""
    from jobs.model import load_dims
    from jobs.prepare import prepare

    job = JobSpec.model_validate_json(spec)
    if job.kind == "train":
        # A hub model's modules are known only here: the same checks as `validate` makes for one that is at hand.
        require_model(job, load_dims(model))

    def progress(split: str, rows: int) -> None:
        log.emit.remote({"event": "rows", "split": split, "rows": rows})

    storage = Storage(root)
    if job.data.dataset and not storage.is_local:
        folder = storage.fetch(DATASET)
        splits = {name: str(folder / Path(source).name) for name, source in splits.items()}
    return prepare(job, root, splits, model, progress)


def describe_model(model: str) -> dict[str, Any]:
    """See `jobs.model.describe_base`."""
    from jobs.model import describe_base

    return describe_base(model).model_dump()


def merge_adapter(spec: str, root: str, revision: str | None, log: Any) -> dict[str, Any]:
    """See `jobs.merge.merge`."""
    from jobs.merge import merge
    from jobs.prepare import fetch_rows

    def progress(done: int, total: int) -> None:
        log.emit.remote({"event": "transcribed", "what": "merged", "done": done, "total": total})

    val = fetch_rows(Storage(root), "val")
    return merge(JobSpec.model_validate_json(spec), root, val, progress, revision=revision)


def resolve_scored_model(model: str) -> dict[str, Any]:
    """See `jobs.score_model.resolve_model`."""
    from jobs.score_model import resolve_model

    return resolve_model(model)
