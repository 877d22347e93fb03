"""What a job reads, by content: a run is gone on with, or called complete, only while its inputs are what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jobs.stages import STAGES, has_begun
from service.artifacts import ADAPTER
from service.errors import Fault, InputError
from service.spec.job import JobSpec
from service.storage import Storage, sha256_of

INPUTS = f"{STAGES}/inputs.json"
WEIGHTS = ("*.safetensors", "*.bin", "adapter_config.json")


def require_same_inputs(spec: JobSpec, root: Storage) -> None:
    """Record the hashes of the manifests and of local weights, or compare them with what an earlier start recorded.

    Raises:
        InputError: an input has changed since; nothing was touched.
    """
    now = {str(path): sha256_of(path) for path in _input_files(spec)}
    if not root.exists(INPUTS) or not has_begun(root):
        root.write_json(INPUTS, now)
        return
    before: dict[str, str] = root.read_json(INPUTS)
    changed = [path for path in before if path in now and now[path] != before[path]]
    if changed:
        way_out = f"has changed since the run in {root.path()} began; give another outdir, or --overwrite to begin anew"
        raise InputError([Fault(path, way_out) for path in changed])


def _input_files(spec: JobSpec) -> Iterator[Path]:
    """The files that this machine can see; on a cluster's head they may all be elsewhere."""
    training, evaluation = spec.training, spec.evaluation
    if spec.kind == "evaluate":
        sources, model = [evaluation.csv], evaluation.model
    elif spec.kind == "export":
        sources, model = [evaluation.csv], spec.export.source
    else:
        sources, model = [training.train_csv, training.val_csv, spec.guard.csv], training.base_model
    for source in sources:
        if source and Path(source).is_file():
            yield Path(source)
    for folder in (Path(name) for name in (model, spec.export.base) if name and Path(name).is_dir()):
        for weights in (folder, folder / ADAPTER):
            for pattern in WEIGHTS:
                yield from sorted(weights.glob(pattern))
