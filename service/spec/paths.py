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

FILE, MEMORY = "file://", "memory://"
"""Other URIs that can be read: of this machine's files, and of what one process keeps to itself, as tests do."""


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


def unknown_uri(path: str, what: str = "a folder") -> str:
    """What is wrong with a URI that neither names a file of this machine nor something in object storage, or nothing.

    Args:
        path: a path, which is never wrong here, or a URI.
        what: what may be given in its place, beside the URI of a store.
    """
    if not is_uri(path) or path.startswith((*STORES, FILE, MEMORY)):
        return ""
    return f"is a URI of a kind that is not known; give {what}, s3:// or gs://"


def is_stored(path: str) -> bool:
    """Whether it is the URI of something in object storage."""
    return path.startswith(STORES)
