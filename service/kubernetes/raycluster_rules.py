"""What KubeRay's operator refuses of a RayCluster although its CRD allows it.

The rules are those of KubeRay 1.7 (`ValidateRayClusterSpec` and what it calls), as far as they concern what a user of
ours may write, and a few of ours: a token, and no password written out. Where one is broken, Kubernetes takes the
object all the same, and no cluster comes of it.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from service.kubernetes.manifest import Manifest, Problems
from service.kubernetes.names import LABEL_KEY, LABEL_VALUE, LONGEST_RAYCLUSTER, name_problems
from service.kubernetes.standard import container_problems

_TOKEN_SINCE, _K8S_TOKEN_SINCE = "2.52.0", "2.55.0"
_REDIS = {"REDIS_PASSWORD": "redisPassword", "RAY_REDIS_ADDRESS": "redisAddress"}
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_OWN_COMMAND = "KUBERAY_GEN_AUTOSCALER_START_CMD"
_GATES = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
"""Settings that the operator refuses unless it was started with a feature gate."""


def ray_cluster_problems(manifest: Manifest) -> Problems:
    """Of a RayCluster."""
    yield from name_problems(manifest, LONGEST_RAYCLUSTER)
    yield from cluster_problems("spec", manifest.get("spec") or {}, manifest)


def cluster_problems(place: str, spec: Manifest, manifest: Manifest) -> Problems:
    """Of the spec of a RayCluster, at its place in a manifest."""
    annotations = (manifest.get("metadata") or {}).get("annotations") or {}
    head, groups = spec.get("headGroupSpec") or {}, spec.get("workerGroupSpecs") or []
    variables = _variables(head)
    scales = bool(spec.get("enableInTreeAutoscaling"))
    new = scales and ((spec.get("autoscalerOptions") or {}).get("version") == "v2" or _is_on(variables))
    for where, group in [("headGroupSpec", head), *((f"workerGroupSpecs[{i}]", one) for i, one in enumerate(groups))]:
        yield from _group_problems(f"{place}.{where}", group, new=new)
    for index, group in enumerate(groups):
        yield from _worker_problems(f"{place}.workerGroupSpecs[{index}]", group, scales=scales, new=new)
    names = [str(group.get("groupName")) for group in groups]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{place}.workerGroupSpecs", f"has the group {name} twice"
    for setting, gate in _GATES.items():
        if spec.get(setting):
            yield f"{place}.{setting}", f"is refused by an operator without the feature gate {gate}"
    yield from _autoscaler_problems(place, spec, variables, scales=scales)
    yield from _fault_tolerance_problems(place, spec, annotations, variables)
    yield from _token_problems(place, spec)


def _group_problems(place: str, group: Manifest, *, new: bool) -> Problems:
    start, pod = group.get("rayStartParams") or {}, (group.get("template") or {}).get("spec") or {}
    if not pod.get("containers"):
        yield f"{place}.template.spec.containers", "has no container"
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
        yield f"{place}.resources", "and the resources in rayStartParams exclude each other"
    if "labels" in start:
        yield f"{place}.rayStartParams.labels", "belongs into the group's own labels"
    for key, value in (group.get("labels") or {}).items():
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            yield f"{place}.labels", f"has {key}={value}, which is no label"
    if new and pod.get("restartPolicy", "Never") != "Never":
        yield f"{place}.template.spec.restartPolicy", "must be Never under autoscaler v2"


def _worker_problems(place: str, group: Manifest, *, scales: bool, new: bool) -> Problems:
    least, most = group.get("minReplicas"), group.get("maxReplicas")
    if not scales and (least is None or most is None):
        yield place, "needs minReplicas and maxReplicas, since there is no autoscaler"
    if (least or 0) < 0 or (most or 0) < 0:
        yield f"{place}.minReplicas", "or maxReplicas is negative"
    elif least is not None and most is not None and least > most:
        yield f"{place}.minReplicas", f"is {least}, above maxReplicas, {most}"
    if group.get("suspend"):
        yield f"{place}.suspend", "is not for a cluster with an autoscaler, and wants the gate RayJobDeletionPolicy"
    if "idleTimeoutSeconds" in group and not new:
        yield f"{place}.idleTimeoutSeconds", "needs autoscaler v2"


def _autoscaler_problems(place: str, spec: Manifest, variables: dict[str, str], *, scales: bool) -> Problems:
    options = spec.get("autoscalerOptions") or {}
    if scales and options.get("version") and _AUTOSCALER_V2 in variables:
        yield f"{place}.autoscalerOptions.version", f"and the head's variable {_AUTOSCALER_V2} exclude each other"
    if not scales and _is_on(variables):
        yield f"{place}.headGroupSpec", f"sets {_AUTOSCALER_V2} without enableInTreeAutoscaling"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield f"{place}.autoscalerOptions.idleTimeoutSeconds", "is negative"
    if any(entry.get("name") == _OWN_COMMAND for entry in options.get("env") or []):
        yield f"{place}.autoscalerOptions.env", f"sets {_OWN_COMMAND}, which is KubeRay's own"
    if scales:
        # KubeRay makes a container of it, in the head's pod.
        pod = (((spec.get("headGroupSpec") or {}).get("template") or {}).get("spec") or {}).get("securityContext") or {}
        yield from container_problems(f"{place}.autoscalerOptions", options, pod)


def _fault_tolerance_problems(place: str, spec: Manifest, annotations: Manifest, variables: dict[str, str]) -> Problems:
    options = spec.get("gcsFaultToleranceOptions")
    start = (spec.get("headGroupSpec") or {}).get("rayStartParams") or {}
    where = f"{place}.gcsFaultToleranceOptions"
    if start.get("redis-username") or "REDIS_USERNAME" in variables:
        yield f"{place}.headGroupSpec", "names Redis' user; give redisUsername in gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables and annotations.get("ray.io/ft-enabled") != "true":
            yield f"{place}.headGroupSpec", "sets RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    for annotation in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotations.get(annotation):
            yield where, f"and the annotation {annotation} exclude each other"
    for variable, setting in _REDIS.items():
        if variable in variables:
            yield f"{place}.headGroupSpec", f"sets {variable}; give {setting} in gcsFaultToleranceOptions"
    if start.get("redis-password"):
        yield f"{place}.headGroupSpec.rayStartParams.redis-password", "belongs into gcsFaultToleranceOptions"
    if options.get("backend", "redis") == "redis":
        if options.get("storage"):
            yield f"{where}.storage", "is for the backend rocksdb"
    elif {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"} & set(options):
        yield where, "has settings of Redis with another backend"
    if "value" in (options.get("redisPassword") or {}):
        yield f"{where}.redisPassword", "is written out; refer to a secret (valueFrom.secretKeyRef)"


def _token_problems(place: str, spec: Manifest) -> Problems:
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
    if options.get("enableK8sTokenAuth"):
        if version < Version(_K8S_TOKEN_SINCE):
            yield f"{place}.rayVersion", f"is below {_K8S_TOKEN_SINCE}, the first one with tokens of Kubernetes"
        if options.get("secretName"):
            yield f"{place}.authOptions.secretName", "and enableK8sTokenAuth exclude each other"


def _variables(head: Manifest) -> dict[str, str]:
    """What the head's Ray container, the first one, has in its environment."""
    containers = ((head.get("template") or {}).get("spec") or {}).get("containers") or [{}]
    return {entry["name"]: entry.get("value", "") for entry in containers[0].get("env") or []}


def _is_on(variables: dict[str, str]) -> bool:
    return variables.get(_AUTOSCALER_V2) in ("1", "true")
