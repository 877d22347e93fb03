"""What a name of a model stands for: a checkpoint, a PEFT adapter on its base, or the adapter of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.merge import Source
from service.artifacts import ADAPTER, MANIFEST, SPEC, read_manifest
from service.errors import Fault, SpecError
from service.spec.paths import is_uri
from service.storage import Storage

ADAPTER_CONFIG = "adapter_config.json"
CHECKPOINT_CONFIG = "config.json"


def resolve_model(model: str, setting: str = "evaluation.model", base: str | None = None) -> dict[str, Any]:
    """What stands behind a name.

    Args:
        model: hub id, folder with a checkpoint or an adapter, root of a run; folders may be URIs.
        setting: where the name was given, for errors.
        base: the base of an adapter, where it is not the one that its configuration names.

    Returns:
        {"base": checkpoint, "revision": its commit on the hub, "adapter": folder or URI, or None, "run": root of the
        run, or None}

    Raises:
        SpecError: a folder that is none of the three.
    """
    if not is_uri(model) and not Path(model).is_dir():
        return _checkpoint(model, setting, base)
    found = Storage(model)
    if found.exists(CHECKPOINT_CONFIG):
        return _checkpoint(model, setting, base)
    run = model if found.exists(SPEC) else None
    inside = f"{ADAPTER}/" if run else ""
    if not found.exists(inside + ADAPTER_CONFIG):
        kinds = (
            "a checkpoint (config.json), a PEFT adapter (adapter_config.json) or the root of a finished run (adapter/)"
        )
        raise SpecError([Fault(setting, f"is not {kinds}", model)])
    named, revision = base, None
    if named is None and run and found.exists(MANIFEST) and (record := read_manifest(found).base):
        named, revision = record.name, record.revision
    named = named or json.loads(found.read_bytes(inside + ADAPTER_CONFIG)).get("base_model_name_or_path")
    if not named:
        raise SpecError([Fault(setting, "is an adapter that names no base model; give it as export.base", model)])
    return {"base": named, "revision": revision, "adapter": found.path(inside.rstrip("/")), "run": run}


def _checkpoint(model: str, setting: str, base: str | None) -> dict[str, Any]:
    if base is not None:
        way_out = "is no adapter that is seen here, but a base was given for one; give the adapter's folder, or no base"
        raise SpecError([Fault(setting, way_out, model)])
    return {"base": model, "revision": None, "adapter": None, "run": None}


def adapter_folder(adapter: str) -> Path:
    """The adapter's files on this machine."""
    parent, _, name = adapter.rstrip("/").rpartition("/")
    return Storage(parent).fetch(name)


def open_source(found: dict[str, Any]) -> Source:
    """What `resolve_model` found, for the merge."""
    adapter = adapter_folder(found["adapter"]) if found["adapter"] else None
    return Source(found["base"], adapter, found["revision"])
