"""What runs as a Ray task. Specs travel as JSON; heavy imports happen there, not in the driver."""

from __future__ import annotations

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
    from jobs.manifest.from_spec import build_from_dataset

    def progress(rows: int) -> None:
        log.emit.remote({"event": "rows", "split": "dataset", "rows": rows})

    return build_from_dataset(JobSpec.model_validate_json(spec), Storage(root).local(DATASET), progress)


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

    return prepare(job, root, splits, model, progress)


def describe_model(model: str) -> dict[str, Any]:
    """See `jobs.model.describe_base`."""
    from jobs.model import describe_base

    return describe_base(model).model_dump()


def merge_adapter(spec: str, root: str, revision: str | None, log: Any) -> dict[str, Any]:
    """See `jobs.merge.merge`."""
    from jobs.merge import merge
    from jobs.prepare import split_file

    def progress(done: int, total: int) -> None:
        log.emit.remote({"event": "transcribed", "what": "merged", "done": done, "total": total})

    val = str(Storage(root).local(split_file("val")))
    return merge(JobSpec.model_validate_json(spec), root, val, progress, revision=revision)


def guard_model(spec: str, root: str, revision: str | None, log: Any) -> dict[str, Any]:
    """See `jobs.guard.stage.guard`."""
    from jobs.guard.stage import guard

    def progress(model: str, done: int, total: int) -> None:
        log.emit.remote({"event": "transcribed", "what": f"guard, {model}", "done": done, "total": total})

    return guard(JobSpec.model_validate_json(spec), root, progress, revision=revision)


def resolve_scored_model(model: str) -> dict[str, Any]:
    """See `jobs.score_model.resolve_model`."""
    from jobs.score_model import resolve_model

    return resolve_model(model)
