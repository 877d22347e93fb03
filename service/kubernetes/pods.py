"""Pod templates: whisper-jobs' image under the restricted pod security standard, with what Ray must write mounted."""

from __future__ import annotations

from collections.abc import Sequence

from service.kubernetes.manifest import Manifest
from service.kubernetes.options import RenderOptions
from service.kubernetes.sizes import RAYS_OWN_CPUS, Workers

TOKEN_SECRET, TOKEN_KEY = "whisper-jobs-token", "auth_token"
"""The cluster's token, under the key by which KubeRay looks for it."""

STORAGE_SECRET = "whisper-jobs-storage"
"""The store's variables (AWS_ACCESS_KEY_ID, ...), as they are."""

HUB_SECRET = "whisper-jobs-hub"
"""HF_TOKEN, for models whose terms were accepted. Optional."""

ACCOUNT, HEAD_ACCOUNT = "whisper-jobs", "whisper-jobs-head"
"""Service accounts without rights; KubeRay gives the second one those that its autoscaler needs."""

USER = 1000
SPEC_FOLDER = "/etc/whisper-jobs"
SPEC_FILE = "spec.json"

GRACE_S = 120
"""From SIGTERM to SIGKILL. A step, a checkpoint and its upload lie between, and Ray's own end."""

DRAIN_S = 90
"""How much of it Ray waits for the work on a node to have moved away."""

OBJECT_STORE_BYTES = 1024**3
"""What Ray's processes hand each other through memory: little here."""

SHARED_MEMORY = "2Gi"
HEALTH_PORT = 52365

HEAD_RAY_MEMORY_BYTES = 2 * 1024**3
"""What Ray gives out of the head's memory: four drivers of trials."""

HEAD_MEMORY = "8Gi"
HEAD_CPUS = "2"
DISK, DISK_LIMIT = "10Gi", "100Gi"
"""Local disk for models, clips and exports: what the scheduler looks for, and where a pod is stopped."""

SPOT_NODES = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""By which labels clouds mark nodes that they may take away."""

SPOT_TAINTS = {"cloud.google.com/gke-spot": "true", "kubernetes.azure.com/scalesetpriority": "spot"}

STAYING = {"karpenter.sh/do-not-disrupt": "true", "cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
"""Annotations: whoever tidies up nodes leaves those alone that hold such a pod."""

GPU = "nvidia.com/gpu"


def labels(component: str) -> dict[str, str]:
    """Labels of a pod; the network policies of k8s/base go by them.

    Args:
        component: `ray` or `client`.
    """
    return {"app.kubernetes.io/part-of": "whisper-jobs", "app.kubernetes.io/component": component}


def container_security() -> Manifest:
    """What the restricted standard wants of a container, and a root that nobody writes to."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def head_template(options: RenderOptions, *, account: str, config_map: str | None = None, api_token: bool) -> Manifest:
    """The head's pod: control service, dashboard, and the jobs' own programs.

    Args:
        options: image, mounts.
        account: its service account.
        config_map: that holds a job's spec.
        api_token: whether to bring a token of the Kubernetes API, for the autoscaler's container alone.
    """
    container = _ray_container(
        "ray-head",
        options,
        cpus=HEAD_CPUS,
        memory=HEAD_MEMORY,
        ports={"gcs-server": 6379, "dashboard": 8265, "metrics": 8080},
    )
    pod = _pod(container, options, account=account)
    pod["affinity"] = {"nodeAffinity": _required([[_term(key, "NotIn", value) for key, value in SPOT_NODES.items()]])}
    if config_map:
        _bring_spec(pod, config_map)
    if api_token:
        pod["volumes"].append({"name": "api-token", "projected": {"sources": _api_token()}})
    # Its readiness is the dashboard's: that is what clients and the operator are sent to.
    container["readinessProbe"]["httpGet"] = {"path": "/api/gcs_healthz", "port": 8265}
    return _template("ray", pod)


def worker_template(options: RenderOptions, workers: Workers) -> Manifest:
    """A worker's pod."""
    cpus = str(workers.cpus + RAYS_OWN_CPUS)
    container = _ray_container("ray-worker", options, cpus=cpus, memory=workers.memory, ports={"metrics": 8080})
    pod = _pod(container, options, account=ACCOUNT)
    tolerations: list[Manifest] = []
    if workers.gpus:
        for kind in ("requests", "limits"):
            container["resources"][kind][GPU] = str(workers.gpus)
        tolerations.append({"key": GPU, "operator": "Exists", "effect": "NoSchedule"})
    if options.node_selector:
        pod["nodeSelector"] = options.node_labels
    if options.spot:
        pod["affinity"] = {"nodeAffinity": _required([[_term(key, "In", value)] for key, value in SPOT_NODES.items()])}
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in SPOT_TAINTS.items()
        ]
    if tolerations:
        pod["tolerations"] = tolerations
    return _template("ray", pod)


def client_template(
    options: RenderOptions,
    name: str,
    *,
    command: Sequence[str] = (),
    environment: Sequence[Manifest] = (),
    config_map: str | None = None,
) -> Manifest:
    """The pod of a client of a cluster, which submits a job and waits for its end.

    Args:
        options: image.
        name: of the container.
        command: its command line; empty: KubeRay's own.
        environment: variables, beside the store's.
        config_map: that holds the job's spec.
    """
    container: Manifest = {
        "name": name,
        "image": options.image,
        **({"command": list(command)} if command else {}),
        **({"env": list(environment)} if environment else {}),
        "envFrom": _environment_from(),
        "resources": _resources({"cpu": "500m", "memory": "1Gi", "ephemeral-storage": "1Gi"}),
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "cache", "mountPath": "/cache"}],
    }
    pod = _pod(container, options, account=ACCOUNT, shared_memory=False, mounts=False)
    pod["restartPolicy"] = "Never"
    if config_map:
        _bring_spec(pod, config_map)
    return _template("client", pod)


def token_environment() -> list[Manifest]:
    """The cluster's token for a client; to Ray's own pods KubeRay gives it."""
    reference = {"secretKeyRef": {"name": TOKEN_SECRET, "key": TOKEN_KEY}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference}]


def _template(component: str, pod: Manifest) -> Manifest:
    return {"metadata": {"labels": labels(component), "annotations": dict(STAYING)}, "spec": pod}


def _ray_container(name: str, options: RenderOptions, *, cpus: str, memory: str, ports: dict[str, int]) -> Manifest:
    resources = _resources({"cpu": cpus, "memory": memory, "ephemeral-storage": DISK})
    resources["limits"]["ephemeral-storage"] = DISK_LIMIT
    healthy = {"httpGet": {"path": "/api/healthz", "port": HEALTH_PORT}, "timeoutSeconds": 5}
    mounts = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "cache", "mountPath": "/cache"},
        {"name": "shared-mem", "mountPath": "/dev/shm"},
        *({"name": _volume(index), "mountPath": mount.path} for index, mount in enumerate(options.mounts)),
    ]
    return {
        "name": name,
        "image": options.image,
        "ports": [{"name": port, "containerPort": number} for port, number in ports.items()],
        "env": [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(DRAIN_S)}],
        "envFrom": _environment_from(),
        "resources": resources,
        "securityContext": container_security(),
        # Ray's own word for a whole node: its raylet and, on the head, the control service.
        "readinessProbe": healthy | {"periodSeconds": 5, "failureThreshold": 10, "initialDelaySeconds": 10},
        # Patient, since the control service may be away for minutes and come back.
        "livenessProbe": healthy | {"periodSeconds": 10, "failureThreshold": 60, "initialDelaySeconds": 60},
        "volumeMounts": mounts,
    }


def _pod(
    container: Manifest, options: RenderOptions, *, account: str, shared_memory: bool = True, mounts: bool = True
) -> Manifest:
    volumes: list[Manifest] = [{"name": "tmp", "emptyDir": {}}, {"name": "cache", "emptyDir": {}}]
    if shared_memory:
        volumes.append({"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}})
    if mounts:
        volumes += [
            {"name": _volume(index), "persistentVolumeClaim": {"claimName": mount.claim}}
            for index, mount in enumerate(options.mounts)
        ]
    pod: Manifest = {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if options.pull_secret:
        pod["imagePullSecrets"] = [{"name": options.pull_secret}]
    return pod


def _bring_spec(pod: Manifest, config_map: str) -> None:
    pod["volumes"].append({"name": "spec", "configMap": {"name": config_map}})
    (container,) = pod["containers"]
    container["volumeMounts"].append({"name": "spec", "mountPath": SPEC_FOLDER, "readOnly": True})


def _volume(index: int) -> str:
    return f"mount-{index}"


def _environment_from() -> list[Manifest]:
    return [
        {"secretRef": {"name": STORAGE_SECRET}},
        {"secretRef": {"name": HUB_SECRET, "optional": True}},
    ]


def _resources(amounts: dict[str, str]) -> Manifest:
    """The same for requests and limits: a pod that gets what it asked for is the last to be evicted."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _term(key: str, operator: str, value: str) -> Manifest:
    return {"key": key, "operator": operator, "values": [value]}


def _required(terms: list[list[Manifest]]) -> Manifest:
    """Node affinity: any of the terms, of each of which all expressions hold."""
    return {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": expressions} for expressions in terms]
        }
    }


def _api_token() -> list[Manifest]:
    """What Kubernetes would mount into every container of the pod, the users' programs among them."""
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
    ]
