"""A RayCluster, as KubeRay has it: of a job's own, or one that stays."""

from __future__ import annotations

from typing import Any

from service.kubernetes.manifest import Manifest
from service.kubernetes.options import RenderOptions
from service.kubernetes.pods import (
    ACCOUNT,
    HEAD_ACCOUNT,
    HEAD_RAY_MEMORY_BYTES,
    OBJECT_STORE_BYTES,
    TOKEN_SECRET,
    container_security,
    head_template,
    worker_template,
)
from service.kubernetes.sizes import Workers
from service.requirements import oldest

API = "ray.io/v1"
GROUP = "workers"

REDIS_SECRET, REDIS_KEY = "whisper-jobs-redis", "password"
REDIS_ADDRESS = "whisper-jobs-redis:6379"

IDLE_S = 300
"""How long a node may have nothing to do before the autoscaler takes it away."""

API_TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"


def job_cluster(options: RenderOptions, workers: Workers, config_map: str) -> Manifest:
    """The spec of a RayCluster that lives as long as its job. What is lost with its head, the job has in its storage;
    so it needs no Redis."""
    head = head_template(options, account=ACCOUNT, config_map=config_map, api_token=False)
    return _cluster(head, _group(options, workers, least=workers.pods, most=workers.pods))


def standing_cluster(options: RenderOptions, workers: Workers, *, most: int) -> Manifest:
    """The spec of a RayCluster that stays: it grows and shrinks with its jobs, and its head may be lost for a while.

    Args:
        options: image.
        workers: each of its worker pods; none is there at first.
        most: worker pods.
    """
    head = head_template(options, account=HEAD_ACCOUNT, api_token=True)
    spec = _cluster(head, _group(options, workers, least=0, most=most))
    spec["enableInTreeAutoscaling"] = True
    spec["autoscalerOptions"] = {
        "version": "v2",
        "idleTimeoutSeconds": IDLE_S,
        "upscalingMode": "Default",
        "resources": {
            "requests": {"cpu": "500m", "memory": "1Gi"},
            "limits": {"cpu": "500m", "memory": "1Gi"},
        },
        "securityContext": container_security(),
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "api-token", "mountPath": API_TOKEN_FOLDER, "readOnly": True},
        ],
    }
    spec["gcsFaultToleranceOptions"] = {
        "redisAddress": REDIS_ADDRESS,
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": REDIS_KEY}}},
    }
    return spec


def _cluster(head: Manifest, group: Manifest) -> Manifest:
    # No CPUs and GPUs on the head, and little memory to give out: it runs the jobs' own programs and the control
    # service, which must not be brought down by the work.
    start = {"num-cpus": "0", "num-gpus": "0", "memory": str(HEAD_RAY_MEMORY_BYTES), "dashboard-host": "0.0.0.0"}
    return {
        "rayVersion": oldest("ray"),
        "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
        "headGroupSpec": {"rayStartParams": start | _memory(), "template": head},
        "workerGroupSpecs": [group],
    }


def _group(options: RenderOptions, workers: Workers, *, least: int, most: int) -> Manifest:
    return {
        "groupName": GROUP,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {"num-cpus": str(workers.cpus)} | _memory(),
        "template": worker_template(options, workers),
    }


def _memory() -> dict[str, Any]:
    return {"object-store-memory": str(OBJECT_STORE_BYTES)}
