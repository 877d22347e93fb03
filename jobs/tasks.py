"""What runs as a Ray task. Specs travel as JSON; heavy imports happen there, not in the driver."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.artifacts import ADAPTER, DATASET, read_manifest
from service.errors import InfeasibleError
from service.spec.checks import require_model, trains
from service.spec.export import missing_extras
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
    if trains(job):
        # A hub model's modules are known only here: the same checks as `validate` makes for one that is at hand.
        require_model(job, load_dims(model))

    def progress(split: str, rows: int) -> None:
        log.emit.remote({"event": "rows", "split": split, "rows": rows})

    storage = Storage(root)
    if job.data.dataset and not storage.is_local:
        folder = storage.fetch(DATASET)
        made = {name for name, source in splits.items() if source.startswith(f"{DATASET}/")}
        splits = {name: str(folder / Path(splits[name]).name) if name in made else splits[name] for name in splits}
    return prepare(job, root, splits, model, progress)


def describe_model(model: str, revision: str | None = None) -> dict[str, Any]:
    """See `jobs.model.describe_base`."""
    from jobs.model import describe_base

    return describe_base(model, revision).model_dump()


def check_exports(formats: list[str]) -> None:
    """Whether everything is installed here that the formats of a job need.

    Raises:
        InfeasibleError: it is not; the message names the extras.
    """
    missing = missing_extras(formats, lambda name: importlib.util.find_spec(name) is not None)
    if missing:
        lacking = ", ".join(package for packages in missing.values() for package in packages)
        raise InfeasibleError(
            f"export.formats: this machine has no {lacking}, which the formats need: "
            f'pip install ".[{",".join(missing)}]" in the checkout of whisper-jobs where the job runs, '
            "or leave the formats out"
        )


def merge_adapter(spec: str, root: str, revision: str | None, log: Any) -> dict[str, Any]:
    """See `jobs.merge.merge`: the adapter that this job has trained."""
    from jobs.merge import Source, merge

    job, storage = JobSpec.model_validate_json(spec), Storage(root)
    source = Source(job.training.base_model, storage.fetch(ADAPTER), revision)
    return merge(job, root, source, _val(storage), _transcribed(log, "merged"))


def merge_source(spec: str, root: str, source: dict[str, Any], log: Any) -> dict[str, Any]:
    """See `jobs.merge.merge`: an adapter from elsewhere."""
    from jobs.merge import merge
    from jobs.sources import open_source

    job, storage = JobSpec.model_validate_json(spec), Storage(root)
    opened = open_source(source)
    if opened.adapter:
        with storage.new_folder(ADAPTER) as folder:
            # These alone: a trainer leaves optimizer states beside them, and pickles with tokens of the hub.
            for path in opened.adapter.glob("adapter_*"):
                if path.suffix in (".json", ".safetensors", ".bin"):
                    shutil.copy(path, folder / path.name)
    return merge(job, root, opened, _val(storage), _transcribed(log, "merged"))


def export_artifact(spec: str, root: str, name: str, log: Any) -> dict[str, Any]:
    """See `jobs.export.artifact.export_artifact`."""
    from jobs.export.artifact import export_artifact

    job, storage = JobSpec.model_validate_json(spec), Storage(root)
    return export_artifact(job, root, name, _val(storage), _transcribed(log, name))


def guard_model(spec: str, root: str, revision: str | None, log: Any) -> dict[str, Any]:
    """See `jobs.guard.stage.guard`."""
    from jobs.guard.stage import guard

    def progress(model: str, done: int, total: int) -> None:
        log.emit.remote({"event": "transcribed", "what": f"guard, {model}", "done": done, "total": total})

    return guard(JobSpec.model_validate_json(spec), root, progress, revision=revision)


def resolve_model(model: str, setting: str, base: str | None = None) -> dict[str, Any]:
    """See `jobs.sources.resolve_model`."""
    from jobs.sources import resolve_model

    return resolve_model(model, setting, base)


def borrow_rows(root: str, run: str) -> dict[str, Any]:
    """Take the held-out rows that a finished run was scored on; returns their entry in manifest.json."""
    from jobs.prepare import split_file

    found = Storage(run)
    data = read_manifest(found).data
    Storage(root).write_bytes(split_file("val"), found.read_bytes(split_file("val")))
    return {"val": data["val"], "sentences_in_both": 0}


def _val(storage: Storage) -> str:
    from jobs.prepare import fetch_rows

    return fetch_rows(storage, "val")


def _transcribed(log: Any, what: str) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        log.emit.remote({"event": "transcribed", "what": what, "done": done, "total": total})

    return progress
