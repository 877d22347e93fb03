"""What KubeRay's operator refuses although its CRDs allow it, and what Kueue wants of a RayJob.

The rules are those of KubeRay 1.7 (`ValidateRayClusterSpec`, `ValidateRayJobSpec` and what they call), as far as they
concern what a user of ours may write. Where one is broken KubeRay takes the object and then does nothing with it but
write an event, which is why they are checked before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from packaging.version import InvalidVersion, Version

from service.kubernetes.names import LONGEST_RAYCLUSTER, LONGEST_RAYJOB, name_problems
from service.kubernetes.render import QUEUE_LABEL

Manifest = dict[str, Any]
Problems = Iterator[tuple[str, str]]
"""Places and what is wrong there."""

_MOST_GROUPS = 7
"""Of workers, under Kueue, whose workloads have 8 kinds of pods: one is the head's."""

_TOKEN_SINCE = "2.52.0"
_REDIS = {"REDIS_PASSWORD": "redisPassword", "RAY_REDIS_ADDRESS": "redisAddress"}
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"


def ray_cluster_problems(manifest: Manifest) -> Problems:
    """Of a RayCluster."""
    yield from name_problems(manifest, LONGEST_RAYCLUSTER)
    yield from _cluster_spec("spec", manifest.get("spec") or {}, manifest)


def ray_job_problems(manifest: Manifest) -> Problems:
    """Of a RayJob."""
    yield from name_problems(manifest, LONGEST_RAYJOB)
    spec = manifest.get("spec") or {}
    shutdown, rules = spec.get("shutdownAfterJobFinishes"), spec.get("deletionStrategy") or {}
    chosen = spec.get("clusterSelector") or {}
    if spec.get("suspend") and not shutdown:
        yield "spec.suspend", "needs shutdownAfterJobFinishes: true"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "spec.ttlSecondsAfterFinished", "is negative"
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "spec.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"
    if rules.get("deletionRules") and shutdown:
        yield "spec.deletionStrategy.deletionRules", "and shutdownAfterJobFinishes: true exclude each other"
    if not spec.get("rayClusterSpec") and not chosen:
        yield "spec", "has neither rayClusterSpec nor clusterSelector"
    if chosen:
        if not chosen.get("ray.io/cluster"):
            yield "spec.clusterSelector", "names no cluster (ray.io/cluster)"
        for setting, word in (("suspend", "suspended"), ("backoffLimit", "begun again")):
            if spec.get(setting):
                yield f"spec.{setting}", f"a job on a cluster of others cannot be {word}"
        if spec.get("submissionMode") == "SidecarMode":
            yield "spec.submissionMode", "SidecarMode needs a cluster of the job's own"
    if spec.get("submissionMode") == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "spec.submissionMode", "SidecarMode takes no submitterPodTemplate and no submitterConfig"
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit"):
        yield "spec.backoffLimit", "is not for InteractiveMode"
    for setting, least in (("backoffLimit", 0), ("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1)):
        if spec.get(setting, least) < least:
            yield f"spec.{setting}", f"is below {least}"
    import yaml

    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "spec.runtimeEnvYAML", "is no YAML of a runtime environment"
    if cluster := spec.get("rayClusterSpec"):
        yield from _cluster_spec("spec.rayClusterSpec", cluster, manifest)
        if cluster.get("upgradeStrategy"):
            yield "spec.rayClusterSpec.upgradeStrategy", "is for clusters that no RayJob makes"
        if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", "is not for a RayJob"
    yield from _queued(manifest, spec)


def _queued(manifest: Manifest, spec: Manifest) -> Problems:
    """Kueue admits a RayJob as one piece, and takes all of it away again."""
    if QUEUE_LABEL not in ((manifest.get("metadata") or {}).get("labels") or {}):
        return
    cluster = spec.get("rayClusterSpec") or {}
    if not spec.get("suspend"):
        yield "spec.suspend", "must be true for Kueue, which begins the job when there is room"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes", "must be true for Kueue, or the room is never given back"
    if spec.get("deletionStrategy"):
        yield "spec.deletionStrategy", "is not for Kueue"
    if not cluster:
        yield "spec.clusterSelector", "is not for Kueue: the room must be the job's own"
    if cluster.get("enableInTreeAutoscaling"):
        yield "spec.rayClusterSpec.enableInTreeAutoscaling", "is not for Kueue, which admits a fixed number of pods"
    if len(cluster.get("workerGroupSpecs") or []) > _MOST_GROUPS:
        yield "spec.rayClusterSpec.workerGroupSpecs", f"has more than the {_MOST_GROUPS} groups that Kueue takes"


def _cluster_spec(place: str, spec: Manifest, manifest: Manifest) -> Problems:
    annotations = (manifest.get("metadata") or {}).get("annotations") or {}
    head, groups = spec.get("headGroupSpec") or {}, spec.get("workerGroupSpecs") or []
    scales = bool(spec.get("enableInTreeAutoscaling"))
    options = spec.get("autoscalerOptions") or {}
    new = scales and options.get("version") == "v2"
    environment = {entry["name"] for entry in _first_container(head).get("env") or []}
    for where, group in [("headGroupSpec", head), *((f"workerGroupSpecs[{i}]", one) for i, one in enumerate(groups))]:
        yield from _group(f"{place}.{where}", group, is_head=where == "headGroupSpec", scales=scales, new=new)
    names = [group.get("groupName") for group in groups]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"{place}.workerGroupSpecs", f"has the group {name} twice"
    if options.get("version") and _AUTOSCALER_V2 in environment:
        yield f"{place}.autoscalerOptions.version", f"and the head's variable {_AUTOSCALER_V2} exclude each other"
    if not scales and _AUTOSCALER_V2 in environment:
        yield f"{place}.headGroupSpec", f"sets {_AUTOSCALER_V2} without enableInTreeAutoscaling"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield f"{place}.autoscalerOptions.idleTimeoutSeconds", "is negative"
    yield from _fault_tolerance(place, spec, annotations, environment)
    yield from _authentication(place, spec)
    yield from _network(place, spec)


def _group(place: str, group: Manifest, *, is_head: bool, scales: bool, new: bool) -> Problems:
    start, pod = group.get("rayStartParams") or {}, (group.get("template") or {}).get("spec") or {}
    if not pod.get("containers"):
        yield f"{place}.template.spec.containers", "has no container"
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
        yield f"{place}.resources", "and the resources in rayStartParams exclude each other"
    if "labels" in start:
        yield f"{place}.rayStartParams.labels", "belongs into the group's own labels"
    if new and pod.get("restartPolicy", "Never") != "Never":
        yield f"{place}.template.spec.restartPolicy", "must be Never under autoscaler v2"
    if is_head:
        return
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not scales and (least is None or most is None):
        yield place, "needs minReplicas and maxReplicas, since there is no autoscaler"
    if (least or 0) < 0 or (most or 0) < 0:
        yield f"{place}.minReplicas", "or maxReplicas is negative"
    elif least is not None and most is not None and least > most:
        yield f"{place}.minReplicas", f"is {least}, above maxReplicas, {most}"
    if group.get("suspend") and scales:
        yield f"{place}.suspend", "is not for a cluster with an autoscaler"
    if "idleTimeoutSeconds" in group and not new:
        yield f"{place}.idleTimeoutSeconds", "needs autoscaler v2"


def _fault_tolerance(place: str, spec: Manifest, annotations: Manifest, environment: set[str]) -> Problems:
    options = spec.get("gcsFaultToleranceOptions")
    start = (spec.get("headGroupSpec") or {}).get("rayStartParams") or {}
    where = f"{place}.gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment and annotations.get("ray.io/ft-enabled") != "true":
            yield f"{place}.headGroupSpec", "sets RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    if annotations.get("ray.io/ft-enabled"):
        yield where, "and the annotation ray.io/ft-enabled exclude each other"
    if annotations.get("ray.io/external-storage-namespace"):
        yield where, "and the annotation ray.io/external-storage-namespace exclude each other"
    for variable, setting in _REDIS.items():
        if variable in environment:
            yield f"{place}.headGroupSpec", f"sets {variable}; give {setting} in gcsFaultToleranceOptions"
    for name in ("redis-password", "redis-username"):
        if start.get(name):
            yield f"{place}.headGroupSpec.rayStartParams.{name}", "belongs into gcsFaultToleranceOptions"
    if options.get("backend", "redis") == "redis":
        if options.get("storage"):
            yield f"{where}.storage", "is for the backend rocksdb"
        if not options.get("redisAddress"):
            yield f"{where}.redisAddress", "is missing"
    elif {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"} & set(options):
        yield where, "has settings of Redis with another backend"
    if "value" in (options.get("redisPassword") or {}):
        yield f"{where}.redisPassword", "is written out; refer to a secret (valueFrom.secretKeyRef)"


def _authentication(place: str, spec: Manifest) -> Problems:
    options = spec.get("authOptions") or {}
    if options.get("mode") != "token":
        yield f"{place}.authOptions.mode", "is not token: anybody who reaches the cluster could run code on it"
        return
    try:
        version = Version(str(spec.get("rayVersion", "")))
    except InvalidVersion:
        yield f"{place}.rayVersion", "must be given for a token"
        return
    if version < Version(_TOKEN_SINCE):
        yield f"{place}.rayVersion", f"is below {_TOKEN_SINCE}, the first one with tokens"
    if options.get("enableK8sTokenAuth") and options.get("secretName"):
        yield f"{place}.authOptions.secretName", "and enableK8sTokenAuth exclude each other"


def _network(place: str, spec: Manifest) -> Problems:
    policy = spec.get("networkPolicy") or {}
    mode, names = (
        policy.get("mode", "DenyAll"),
        {group.get("groupName") for group in spec.get("workerGroupSpecs") or []},
    )
    groups = policy.get("workerGroups") or []
    for who, rules in [("head", policy.get("head")), ("worker", policy.get("worker")), *(("group", g) for g in groups)]:
        for open_mode, kind in (("DenyAllEgress", "ingressRules"), ("DenyAllIngress", "egressRules")):
            if mode == open_mode and (rules or {}).get(kind):
                yield f"{place}.networkPolicy", f"has {kind} of the {who} with mode {mode}, which restricts none"
    for group in groups:
        if group.get("groupName") not in names:
            yield f"{place}.networkPolicy.workerGroups", f"names {group.get('groupName')}, which is no worker group"


def _first_container(group: Manifest) -> Manifest:
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or [{}]
    first: Manifest = containers[0]
    return first
