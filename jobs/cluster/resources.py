"""What a job's workers ask for, and what the cluster's nodes could give, were there no other job."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from service.errors import InfeasibleError
from service.spec.counted import counted
from service.spec.job import JobSpec


@dataclass(frozen=True)
class Resources:
    """What each training worker asks for."""

    workers: int
    cpus: float
    gpus: float

    def per_worker(self) -> dict[str, float]:
        """For Ray."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def resources_for(spec: JobSpec) -> Resources:
    """What the job's workers ask for; with no word on GPUs, one each where the cluster has any."""
    asked = spec.resources
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    # A trial of a search that trains in its own process is a worker to the cluster.
    workers = max(1, asked.workers) if spec.kind == "search" else asked.workers
    return Resources(workers, asked.cpus_per_worker, gpus)


def missing_resources(needed: Resources) -> str:
    """What no placement on the present nodes can give, in words; empty where all fits."""
    return "" if fitting(needed) >= needed.workers else in_words(needed, _nodes())


def groups_at_once(needed: Resources) -> int:
    """How many groups of such workers the present nodes can hold, were there no other job."""
    return fitting(needed) // max(1, needed.workers)


def fitting(needed: Resources) -> int:
    """How many such workers the present nodes can hold, were there no other job."""
    count = 0
    for node in _nodes():
        room = [node.get(name, 0.0) / amount for name, amount in needed.per_worker().items() if amount]
        count += int(min(room)) if room else needed.workers
    return count


def infeasible(needed: Resources, missing: str, where: str) -> InfeasibleError:
    """The error where there is no room for workers.

    Args:
        needed: what they ask for.
        missing: what there is not of it, in words; empty: others hold it.
        where: who has no more.
    """
    way_out = "lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
    if missing:
        way_out = f"L{way_out[1:]}"
        asking = "1 process asks" if needed.workers == 1 else f"{needed.workers} workers ask"
        return InfeasibleError(f"resources: {asking} for {missing}; {where} has no more. {way_out}")
    return InfeasibleError(
        f"resources: {counted(needed.workers, 'worker asks', 'workers ask')} for {in_words(needed)}, which {where} "
        f"has, but other jobs hold them. Wait longer (resources.wait_s), or {way_out}"
    )


def in_words(needed: Resources, nodes: list[dict[str, float]] | None = None) -> str:
    """What the workers ask for, and what there is of it."""
    parts = []
    for name, amount in needed.per_worker().items():
        there = "" if nodes is None else f" (there are {sum(node.get(name, 0.0) for node in nodes):g})"
        parts.append(f"{counted(amount * needed.workers, name)}{there}")
    return " and ".join(parts)


def _nodes() -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
