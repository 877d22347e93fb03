"""What a job reads, by content: a run is gone on with, or called complete, only while its inputs are what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from jobs.stages import STAGES, has_begun
from service.artifacts import ADAPTER
from service.errors import Fault, InputError
from service.spec.job import JobSpec
from service.spec.paths import is_stored
from service.storage import Storage, sha256_of
from service.storage.objects import Found

INPUTS = f"{STAGES}/inputs.json"
WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")


def require_same_inputs(spec: JobSpec, root: Storage) -> None:
    """Record what the manifests and the weights hold, or compare it with what an earlier start recorded.

    Raises:
        InputError: an input has changed since; nothing was touched.
    """
    now = {path: content for source in _inputs(spec) for path, content in source.items()}
    if not root.exists(INPUTS) or not has_begun(root):
        root.write_json(INPUTS, now)
        return
    before: dict[str, str] = root.read_json(INPUTS)
    changed = [path for path in before if path in now and now[path] != before[path]]
    if changed:
        way_out = f"has changed since the run in {root.path()} began; give another outdir, or --overwrite to begin anew"
        raise InputError([Fault(path, way_out) for path in changed])


def _inputs(spec: JobSpec) -> Iterator[dict[str, str]]:
    """The files that this machine can see, each with its hash or the store's mark; on a cluster's head those that are
    no URIs may all be elsewhere."""
    training, evaluation = spec.training, spec.evaluation
    if spec.kind == "evaluate":
        sources, model = [evaluation.csv], evaluation.model
    elif spec.kind == "export":
        sources, model = [evaluation.csv], spec.export.source
    else:
        sources, model = [training.train_csv, training.val_csv, spec.guard.csv], training.base_model
    for source in sources:
        if source and is_stored(source):
            yield _stored_file(source)
        elif source and Path(source).is_file():
            yield {source: sha256_of(Path(source))}
    for name in (model, spec.export.base):
        if name and is_stored(name):
            yield _stored_weights(name)
        elif name and Path(name).is_dir():
            paths = [path for folder in (Path(name), Path(name, ADAPTER)) for path in _weights(folder)]
            yield {str(path): sha256_of(path) for path in paths}


def _weights(folder: Path) -> Iterator[Path]:
    for pattern in WEIGHTS:
        yield from sorted(folder.glob(pattern))


def _stored_file(uri: str) -> dict[str, str]:
    folder, _, name = uri.rpartition("/")
    found = Storage(folder).objects().look(name)
    return {uri: _mark(found)} if found else {}


def _stored_weights(uri: str) -> dict[str, str]:
    storage = Storage(uri)
    return {
        storage.path(name): _mark(found)
        for name, found in storage.objects().listed().items()
        if PurePosixPath(name).parent.as_posix() in (".", ADAPTER)
        and any(PurePosixPath(name).match(pattern) for pattern in WEIGHTS)
    }


def _mark(found: Found) -> str:
    """What changes with an object's content: its hash, where its upload has written that down, else its etag."""
    return found.sha256 or f"etag {found.etag}"
