"""What no schema says of a manifest: rules of KubeRay's operator and of Kueue, and what we ask of every pod."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from service.errors import Fault
from service.kubernetes.names import LONGEST_CRONJOB, name_problems
from service.kubernetes.operator import Manifest, Problems, ray_cluster_problems, ray_job_problems
from service.kubernetes.options import schedule_problem
from service.kubernetes.standard import pod_problems


def check(manifests: Iterable[Manifest]) -> list[Fault]:
    """Everything that is wrong with manifests, by kind, name and place.

    Args:
        manifests: as YAML has them; kinds that nothing is known of pass.
    """
    faults = []
    for manifest in manifests:
        kind = manifest.get("kind", "?")
        name = (manifest.get("metadata") or {}).get("name", "?")
        for place, message in _KINDS.get(kind, _nothing)(manifest):
            faults.append(Fault(f"{kind}/{name} {place}".rstrip(), message))
        for place, template in pod_templates(manifest):
            for more, message in pod_problems(
                template, on_ray=kind in ("RayCluster", "RayJob") and "submitter" not in place
            ):
                faults.append(Fault(f"{kind}/{name} {place}.{more}", message))
    return faults


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """The pod templates of a manifest, each with its place."""
    spec = manifest.get("spec") or {}
    match manifest.get("kind"):
        case "RayCluster":
            yield from _ray_templates("spec", spec)
        case "RayJob":
            yield from _ray_templates("spec.rayClusterSpec", spec.get("rayClusterSpec") or {})
            if "submitterPodTemplate" in spec:
                yield "spec.submitterPodTemplate", spec["submitterPodTemplate"]
        case "CronJob":
            yield "spec.jobTemplate.spec.template", spec["jobTemplate"]["spec"]["template"]
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            yield "spec.template", spec["template"]


def _ray_templates(place: str, cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    if head := (cluster.get("headGroupSpec") or {}).get("template"):
        yield f"{place}.headGroupSpec.template", head
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        yield f"{place}.workerGroupSpecs[{index}].template", group.get("template") or {}


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
