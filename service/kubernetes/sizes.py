"""Pods and their resources, from what a spec asks of a cluster."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from service.plan import make_plan
from service.spec.job import JobSpec
from service.spec.shared import TRIALS, is_shared
from service.spec.whisper_dims import known_dims
from service.spec.whisper_modules import total_parameters

GIB = 1024**3

UNKNOWN_MEMORY_GIB = 16
"""For a worker whose base model is not known on this machine."""

BESIDE_THE_MODEL_GIB = 8
"""For a GPU worker's libraries, decoded audio and the exports."""

RAYS_OWN_CPUS = 1
"""For Ray's own processes in a worker's pod, so that they take nothing from what the job was promised."""

LEAST_MEMORY_GIB = 4
"""Of a pod: Ray's own processes and object store have half of it."""

_QUANTITY = re.compile(r"([1-9][0-9]{0,6})(Mi|Gi|Ti)", re.ASCII)
_UNITS_GIB = {"Mi": 1 / 1024, "Gi": 1, "Ti": 1024}


@dataclass(frozen=True)
class Workers:
    """The worker pods of a cluster.

    Attributes:
        pods: how many.
        cpus: that Ray may give out on each.
        gpus: of each.
        memory: of each, as Kubernetes writes it.
        notes: what the user should know of how this came about.
    """

    pods: int
    cpus: int
    gpus: int
    memory: str
    notes: tuple[str, ...] = ()


def workers_of(spec: JobSpec, memory: str | None = None) -> Workers:
    """The worker pods that hold a job.

    Args:
        spec: checked; `resources.gpus_per_worker` null means one GPU each.
        memory: of a pod, where the user has said it.
    """
    asked, notes = spec.resources, []
    gpus = 1.0 if asked.gpus_per_worker is None else asked.gpus_per_worker
    if asked.gpus_per_worker is None:
        notes.append("resources.gpus_per_worker is not set: each worker gets a GPU (0 trains on CPUs)")
    # What an export does, it does in one task.
    count = 1 if spec.kind == "export" else max(1, asked.workers)
    if spec.kind == "export":
        gpus = min(1.0, gpus)
    if asked.min_workers is not None:
        notes.append("resources.min_workers: KubeRay begins a RayJob when all of its pods run, and not before")
    if spec.kind == "search":
        together = TRIALS if is_shared(spec) else 1
        count *= math.ceil((spec.search.concurrent or 1) / together)
        if together > 1:
            notes.append(f"{TRIALS} trials train together in each worker")
        elif spec.search.concurrent is None:
            notes.append("search.concurrent is not set: there is room for one trial at a time")
    # Where a GPU is shared, its sharers are in one pod.
    per_pod = int(1 / gpus) if 0 < gpus < 1 else 1
    per_pod = min(per_pod, count)
    if memory is None:
        each, known = _memory_gib(spec, on_gpu=bool(gpus))
        memory = f"{each * per_pod}Gi"
        if not known:
            notes.append(f"the size of the base model is not known here: {memory} of memory a pod; --memory gives more")
    return Workers(
        pods=math.ceil(count / per_pod),
        cpus=math.ceil(asked.cpus_per_worker * per_pod),
        gpus=math.ceil(gpus),
        memory=memory,
        notes=tuple(notes),
    )


def gib_of(quantity: str) -> float | None:
    """An amount of memory as Kubernetes writes it, in GiB; None: it is none."""
    found = _QUANTITY.fullmatch(quantity)
    return int(found[1]) * _UNITS_GIB[found[2]] if found else None


def _memory_gib(spec: JobSpec, *, on_gpu: bool) -> tuple[int, bool]:
    """Main memory of a worker, and whether its model is known."""
    models = {"evaluate": spec.evaluation.model, "export": spec.export.base}
    model = models.get(spec.kind, spec.training.base_model)
    dims = known_dims(model) if model else None
    if dims is None:
        return UNKNOWN_MEMORY_GIB, False
    # Read twice in float32: the model itself, and beside it the merged one when the two are compared.
    needed = 2 * 4 * total_parameters(dims) / GIB + BESIDE_THE_MODEL_GIB
    if memory := make_plan(spec).memory:
        if not on_gpu:
            needed = max(needed, memory.peak / GIB + BESIDE_THE_MODEL_GIB / 2)
        needed += memory.host.total / GIB
    return math.ceil(needed), True
