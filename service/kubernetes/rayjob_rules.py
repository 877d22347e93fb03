"""What KubeRay's operator and Kueue refuse of a RayJob although its CRD allows it.

The rules are those of KubeRay 1.7 (`ValidateRayJobSpec` and what it calls), as far as they concern what a user of ours
may write. Where one is broken, Kubernetes takes the object all the same: the job never begins, and under Kueue may keep
its room.
"""

from __future__ import annotations

from service.kubernetes.manifest import Manifest, Problems
from service.kubernetes.names import LONGEST_RAYJOB, QUEUE_LABEL, name_problems
from service.kubernetes.raycluster_rules import cluster_problems

_MOST_GROUPS = 6
"""Of workers, under Kueue, whose workloads have 8 kinds of pods: the head and the submitter are two of them."""

_KUEUES_OWN = ("head", "submitter")


def ray_job_problems(manifest: Manifest) -> Problems:
    """Of a RayJob."""
    yield from name_problems(manifest, LONGEST_RAYJOB)
    spec = manifest.get("spec") or {}
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        yield "spec", "has neither rayClusterSpec nor clusterSelector"
    yield from _end_problems(spec)
    yield from _selector_problems(spec)
    yield from _submission_problems(spec)
    for setting, least in (("backoffLimit", 0), ("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1)):
        if spec.get(setting, least) < least:
            yield f"spec.{setting}", f"is below {least}"
    if cluster := spec.get("rayClusterSpec"):
        yield from cluster_problems("spec.rayClusterSpec", cluster, manifest)
        if (cluster.get("upgradeStrategy") or {}).get("type"):
            yield "spec.rayClusterSpec.upgradeStrategy", "is for clusters that no RayJob makes"
        if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", "is not for a RayJob"
    if QUEUE_LABEL in ((manifest.get("metadata") or {}).get("labels") or {}):
        yield from _queue_problems(spec)


def _end_problems(spec: Manifest) -> Problems:
    shutdown, lasting = spec.get("shutdownAfterJobFinishes"), spec.get("ttlSecondsAfterFinished", 0)
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend", "needs shutdownAfterJobFinishes: true"
    if lasting < 0:
        yield "spec.ttlSecondsAfterFinished", "is negative"
    if lasting and not shutdown:
        yield "spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and shutdown:
        yield "spec.deletionStrategy.deletionRules", "and shutdownAfterJobFinishes: true exclude each other"


def _selector_problems(spec: Manifest) -> Problems:
    chosen = spec.get("clusterSelector")
    if not chosen:
        return
    if not chosen.get("ray.io/cluster"):
        yield "spec.clusterSelector", "names no cluster (ray.io/cluster)"
    for setting, word in (("suspend", "suspended"), ("backoffLimit", "begun again")):
        if spec.get(setting):
            yield f"spec.{setting}", f"a job on a cluster of others cannot be {word}"


def _submission_problems(spec: Manifest) -> Problems:
    import yaml

    mode = spec.get("submissionMode", "K8sJobMode")
    head = (((spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {}).get("template") or {}).get("spec") or {}
    if mode == "SidecarMode":
        if spec.get("clusterSelector"):
            yield "spec.submissionMode", "SidecarMode needs a cluster of the job's own"
        if "submitterPodTemplate" in spec or "submitterConfig" in spec:
            yield "spec.submissionMode", "SidecarMode takes no submitterPodTemplate and no submitterConfig"
        if head.get("restartPolicy", "Never") != "Never":
            yield "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "must be Never in SidecarMode"
    if mode == "InteractiveMode" and spec.get("backoffLimit"):
        yield "spec.backoffLimit", "is not for InteractiveMode"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "spec.runtimeEnvYAML", "is no YAML of a runtime environment"


def _queue_problems(spec: Manifest) -> Problems:
    """Kueue admits a RayJob as one piece, and takes all of it away again."""
    cluster = spec.get("rayClusterSpec") or {}
    groups = [group.get("groupName") for group in cluster.get("workerGroupSpecs") or []]
    if not spec.get("suspend"):
        yield "spec.suspend", "must be true for Kueue, which begins the job when there is room"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes", "must be true for Kueue, or the room is never given back"
    if spec.get("ttlSecondsAfterFinished"):
        yield "spec.ttlSecondsAfterFinished", "must be 0 for Kueue, which gives the room to others at the job's end"
    if spec.get("deletionStrategy"):
        yield "spec.deletionStrategy", "is not for Kueue"
    if not cluster:
        yield "spec.clusterSelector", "is not for Kueue: the room must be the job's own"
    if cluster.get("enableInTreeAutoscaling"):
        yield "spec.rayClusterSpec.enableInTreeAutoscaling", "is not for Kueue, which admits a fixed number of pods"
    if len(groups) > _MOST_GROUPS:
        yield "spec.rayClusterSpec.workerGroupSpecs", f"has more than the {_MOST_GROUPS} groups that Kueue takes"
    for name in set(groups) & set(_KUEUES_OWN):
        yield "spec.rayClusterSpec.workerGroupSpecs", f"has a group {name}, which is what Kueue calls another one"
