"""Local paths of a spec made absolute: Ray's workers start in other folders than the user."""

from __future__ import annotations

from typing import Any

from service.spec import look
from service.spec.job import JobSpec
from service.spec.whisper_dims import is_folder

PATHS = ("training.train_csv", "training.val_csv", "training.outdir", "evaluation.csv", "guard.csv", "storage.uri")
"""Settings that hold a path or URI."""

MODELS = ("training.base_model", "evaluation.model", "data.dataset", "export.source", "export.base")
"""Settings that hold a hub id or a path."""


STORES = ("s3://", "s3a://", "gs://", "gcs://")
"""How the URIs of object storage begin."""


def absolute(spec: JobSpec) -> JobSpec:
    """The spec with every local path absolute, from the current folder on; URIs and hub ids stay as they are."""
    changes: dict[str, dict[str, Any]] = {}
    for path in PATHS + MODELS:
        section, name = path.split(".")
        value = getattr(getattr(spec, section), name)
        if value is None or is_uri(value) or (path in MODELS and not is_folder(value)):
            continue
        changes.setdefault(section, {})[name] = look.absolute(value)
    return spec.model_copy(
        update={section: getattr(spec, section).model_copy(update=values) for section, values in changes.items()}
    )


def is_uri(path: str) -> bool:
    """Whether it names a place by protocol (`s3://...`) rather than by a path."""
    return "://" in path


def is_stored(path: str) -> bool:
    """Whether it is the URI of something in object storage."""
    return path.startswith(STORES)
