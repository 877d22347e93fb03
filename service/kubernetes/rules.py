"""What no schema says of a manifest: rules of KubeRay's operator and of Kueue, and what we ask of every pod."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from service.errors import Fault
from service.kubernetes.manifest import Manifest, Problems
from service.kubernetes.names import LONGEST_CRONJOB, name_problems
from service.kubernetes.raycluster_rules import ray_cluster_problems
from service.kubernetes.rayjob_rules import ray_job_problems
from service.kubernetes.schedule import schedule_problem
from service.kubernetes.standard import pod_problems

RAY, OTHER = "ray", "other"
"""What a pod is: a node of Ray, which has work to save when it must go, or something else."""

_NO_PODS = {"Namespace", "ServiceAccount", "NetworkPolicy", "ConfigMap", "Service", "PersistentVolumeClaim"}
_TEMPLATED = {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"}


def check(manifests: Iterable[Manifest]) -> list[Fault]:
    """Everything that is wrong with manifests, by kind, name and place.

    Args:
        manifests: as YAML has them; kinds that nothing is known of pass.
    """
    faults = []
    for manifest in manifests:
        kind = manifest.get("kind", "?")
        metadata = manifest.get("metadata")
        name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
        try:
            found = list(_problems(manifest, kind))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Rules read what a schema promises; they are no schema themselves.
            text = f"is not of the form of its kind ({type(error).__name__}: {error}); `kubectl apply --dry-run=server`"
            found = [("", f"{text} says where")]
        faults += [Fault(f"{kind}/{name} {place}".rstrip(), message) for place, message in found]
    return faults


def unknown_kinds(manifests: Iterable[Manifest]) -> list[str]:
    """Kinds that nothing is known of here."""
    known = _NO_PODS | _TEMPLATED | set(_KINDS) | {"Pod", "RayCronJob"}
    return sorted({str(manifest.get("kind")) for manifest in manifests} - known)


def _problems(manifest: Manifest, kind: str) -> Problems:
    yield from _KINDS.get(kind, _nothing)(manifest)
    for place, role, template in pod_templates(manifest):
        for more, message in pod_problems(template, on_ray=role == RAY):
            yield f"{place}.{more}".lstrip("."), message


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, str, Manifest]]:
    """The pod templates of a manifest, each with its place and what its pods are."""
    spec = manifest.get("spec") or {}
    kind = manifest.get("kind")
    if kind == "RayCluster":
        yield from _ray_templates("spec", spec)
    elif kind == "RayJob":
        yield from _job_templates("spec", spec)
    elif kind == "RayCronJob":
        yield from _job_templates("spec.jobTemplate", spec["jobTemplate"])
    elif kind == "CronJob":
        yield "spec.jobTemplate.spec.template", OTHER, spec["jobTemplate"]["spec"]["template"]
    elif kind in _TEMPLATED:
        yield "spec.template", OTHER, spec["template"]
    elif kind == "Pod":
        yield "", OTHER, manifest


def _job_templates(place: str, spec: Manifest) -> Iterator[tuple[str, str, Manifest]]:
    yield from _ray_templates(f"{place}.rayClusterSpec", spec.get("rayClusterSpec") or {})
    if "submitterPodTemplate" in spec:
        yield f"{place}.submitterPodTemplate", OTHER, spec["submitterPodTemplate"]


def _ray_templates(place: str, cluster: Manifest) -> Iterator[tuple[str, str, Manifest]]:
    if head := (cluster.get("headGroupSpec") or {}).get("template"):
        yield f"{place}.headGroupSpec.template", RAY, head
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        yield f"{place}.workerGroupSpecs[{index}].template", RAY, group.get("template") or {}


def _nothing(_: Manifest) -> Problems:
    yield from ()


def _cron_job(manifest: Manifest) -> Problems:
    yield from name_problems(manifest, LONGEST_CRONJOB)
    spec = manifest.get("spec") or {}
    if problem := schedule_problem(str(spec.get("schedule", ""))):
        yield "spec.schedule", problem
    if spec.get("concurrencyPolicy") != "Forbid":
        yield "spec.concurrencyPolicy", "is not Forbid: one search would begin while the last is at work"


def _secret(manifest: Manifest) -> Problems:
    yield "", "is written out; make it on the cluster (`kubectl create secret`) and refer to it by name"


_KINDS: dict[str, Callable[[Manifest], Problems]] = {
    "RayCluster": ray_cluster_problems,
    "RayJob": ray_job_problems,
    "CronJob": _cron_job,
    "Secret": _secret,
}
