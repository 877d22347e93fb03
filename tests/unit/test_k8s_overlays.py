"""k8s/ as a cluster would get it: each overlay builds, is valid, and keeps its promises."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import has_crds, problems

from service.kubernetes import RenderOptions, check
from service.kubernetes.pods import STAYING, client_template, token_environment, worker_template
from service.kubernetes.rules import pod_templates
from service.kubernetes.sizes import Workers

ROOT = Path(__file__).parents[2]
BUILDS = ["base", *sorted(f"overlays/{path.name}" for path in (ROOT / "k8s/overlays").iterdir())]
EXAMPLES = sorted((ROOT / "k8s/examples").glob("*.yaml"))

SECRETS = {"whisper-jobs-token", "whisper-jobs-storage", "whisper-jobs-redis", "whisper-jobs-hub"}
"""Made by hand, as docs/kubernetes.md says."""

needs_kubectl = pytest.mark.skipif(
    not shutil.which("kubectl"), reason="there is no kubectl, whose kustomize builds overlays"
)

Manifest = dict[str, Any]


@cache
def build(name: str) -> list[Manifest]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(ROOT / "k8s" / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def cluster(name: str) -> Manifest:
    (found,) = of_kind(build(name), "RayCluster")
    spec: Manifest = found["spec"]
    return spec


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in strings(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in strings(inner)]
    return [value] if isinstance(value, str) else []


@needs_kubectl
@pytest.mark.parametrize("name", BUILDS)
def test_an_overlay_is_valid_to_the_last_object(name: str) -> None:
    manifests = build(name)

    assert check(manifests) == []
    for manifest in manifests:
        if manifest["kind"] != "RayCluster" or has_crds():
            assert problems(manifest) == [], manifest["metadata"]["name"]
    assert len({(one["kind"], one["metadata"]["name"]) for one in manifests}) == len(manifests)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_rendered_example_is_valid(path: Path) -> None:
    manifests = list(yaml.safe_load_all(path.read_text()))

    assert check(manifests) == []
    for manifest in manifests:
        if manifest["kind"] != "RayJob" or has_crds():
            assert problems(manifest) == []


@needs_kubectl
@pytest.mark.parametrize("name", BUILDS)
def test_all_that_is_referred_to_is_there_or_is_made_by_hand(name: str) -> None:
    manifests = build(name)
    accounts = {one["metadata"]["name"] for one in of_kind(manifests, "ServiceAccount")}
    chapter = (ROOT / "docs/kubernetes.md").read_text()

    for manifest in manifests:
        text = yaml.safe_dump(manifest)
        for secret in re.findall(r"secretKeyRef:\n\s+key: \S+\n\s+name: (\S+)", text):
            assert secret in SECRETS
        for secret in re.findall(r"secretRef:\n\s+name: (\S+)", text):
            assert secret in SECRETS
        for _, _, template in pod_templates(manifest):
            assert template["spec"].get("serviceAccountName", "whisper-jobs") in accounts
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "whisper-jobs"
    assert not of_kind(manifests, "Secret")
    for secret in SECRETS:
        assert f"create secret generic {secret}" in chapter


@needs_kubectl
def test_no_account_has_rights_and_no_pod_has_a_token_but_the_autoscaler() -> None:
    manifests = build("base")

    assert not {one["kind"] for one in manifests} & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}
    assert all(one["automountServiceAccountToken"] is False for one in of_kind(manifests, "ServiceAccount"))
    for manifest in manifests:
        for _, _, template in pod_templates(manifest):
            assert template["spec"]["automountServiceAccountToken"] is False
            for container in template["spec"]["containers"]:
                assert not any(mount["name"] == "api-token" for mount in container.get("volumeMounts", []))
    mounts = cluster("base")["autoscalerOptions"]["volumeMounts"]
    assert [m["mountPath"] for m in mounts if m["name"] == "api-token"] == [
        "/var/run/secrets/kubernetes.io/serviceaccount"
    ]


@needs_kubectl
def test_the_cluster_scales_authenticates_and_survives_its_head() -> None:
    spec = cluster("base")

    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token", "secretName": "whisper-jobs-token"}
    services = [one["metadata"]["name"] for one in of_kind(build("base"), "Service")]
    host, _, port = spec["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    assert (host in services, port) == (True, "6379")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["workerGroupSpecs"][0]["minReplicas"] == 0


@needs_kubectl
def test_the_gpu_overlay_asks_for_gpus_where_gpus_are() -> None:
    spec = cluster("overlays/gpu")
    worker = spec["workerGroupSpecs"][0]["template"]["spec"]
    container = worker["containers"][0]

    assert container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in worker["tolerations"]
    assert container["image"].endswith("-cuda")
    assert "nvidia.com/gpu" not in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]


@needs_kubectl
def test_the_spot_overlay_places_workers_as_render_does_and_leaves_the_head() -> None:
    spec = cluster("overlays/spot")
    worker = spec["workerGroupSpecs"][0]["template"]["spec"]
    rendered = worker_template(RenderOptions("x", spot=True), Workers(1, 4, 1, "24Gi"))["spec"]

    assert worker["affinity"] == rendered["affinity"]
    assert worker["tolerations"] == rendered["tolerations"]
    assert spec["headGroupSpec"] == cluster("overlays/gpu")["headGroupSpec"]
    (redis,) = of_kind(build("overlays/spot"), "StatefulSet")
    head = spec["headGroupSpec"]["template"]["spec"]
    assert redis["spec"]["template"]["spec"]["affinity"] == head["affinity"]


@needs_kubectl
@pytest.mark.parametrize("name", BUILDS)
def test_images_stay_what_they_are(name: str) -> None:
    images = [
        container["image"]
        for manifest in build(name)
        for _, _, template in pod_templates(manifest)
        for container in template["spec"]["containers"]
    ]

    assert images
    for image in images:
        assert re.search(r":[\w.-]*\d[\w.-]*(@sha256:[0-9a-f]{64})?$", image), image
        assert not image.endswith(":latest")


# The network


def allows(
    manifests: list[Manifest], pod: dict[str, str], direction: str, port: int, peer: dict[str, str] | None
) -> bool:
    """Whether the policies let a pod with these labels talk on a port; peer None: somebody outside the cluster."""
    for policy in of_kind(manifests, "NetworkPolicy"):
        spec = policy["spec"]
        if not selects(spec["podSelector"], pod) or direction not in spec["policyTypes"]:
            continue
        for rule in spec.get(direction.lower(), []):
            if not any(p["port"] == port for p in rule.get("ports", [{"port": port}])):
                continue
            peers = rule.get("from" if direction == "Ingress" else "to")
            if peers is None or (peer is not None and any(is_meant(one, peer) for one in peers)):
                return True
    return False


ELSEWHERE = "of another namespace"
"""A label of ours, for tests: the pod is in another namespace."""


def is_meant(rule: Manifest, peer: dict[str, str]) -> bool:
    """Whether a rule's peer is this pod: without namespaceSelector it must be of the same namespace."""
    assert rule.get("namespaceSelector", {}) == {}, "any namespace, or none"
    return selects(rule["podSelector"], peer) and ("namespaceSelector" in rule or ELSEWHERE not in peer)


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions") or [])


def of_ray(kind: str, name: str = "whisper-jobs") -> dict[str, str]:
    """Labels of a Ray pod: ours, and those that KubeRay adds."""
    own = {"app.kubernetes.io/part-of": "whisper-jobs", "app.kubernetes.io/component": "ray"}
    return own | {"ray.io/node-type": kind, "ray.io/cluster": name, "app.kubernetes.io/name": "kuberay"}


CLIENT = {"app.kubernetes.io/part-of": "whisper-jobs", "app.kubernetes.io/component": "client"}
REDIS = {"app.kubernetes.io/part-of": "whisper-jobs", "app.kubernetes.io/component": "redis"}
COMPONENT = {"app.kubernetes.io/component": "kuberay-operator", ELSEWHERE: "yes"}
OPERATOR = COMPONENT | {"app.kubernetes.io/name": "kuberay"}
OPERATOR_BY_HELM = COMPONENT | {"app.kubernetes.io/name": "kuberay-operator"}
STRANGER = {"app": "something-else"}
HEAD, WORKER, JOBS_HEAD = of_ray("head"), of_ray("worker"), of_ray("head", "turbo-lora-x7k2p")


@needs_kubectl
@pytest.mark.parametrize(
    ("pod", "direction", "port", "peer", "allowed"),
    [
        (HEAD, "Egress", 53, None, True),
        (REDIS, "Egress", 53, None, True),
        (WORKER, "Egress", 443, None, True),
        (CLIENT, "Egress", 443, None, True),
        (REDIS, "Egress", 443, None, False),
        (WORKER, "Egress", 80, None, False),
        (WORKER, "Egress", 6443, None, False),
        (HEAD, "Egress", 6443, None, True),
        (WORKER, "Ingress", 34567, HEAD, True),
        (HEAD, "Ingress", 6379, WORKER, True),
        (JOBS_HEAD, "Ingress", 6379, WORKER, True),
        (WORKER, "Ingress", 34567, STRANGER, False),
        (WORKER, "Ingress", 34567, CLIENT, False),
        (HEAD, "Ingress", 8265, CLIENT, True),
        (HEAD, "Ingress", 8265, OPERATOR, True),
        (JOBS_HEAD, "Ingress", 8265, OPERATOR, True),
        (JOBS_HEAD, "Ingress", 8265, OPERATOR_BY_HELM, True),
        (HEAD, "Ingress", 8265, COMPONENT | {"app.kubernetes.io/name": "mine"}, False),
        (HEAD, "Ingress", 8265, CLIENT | {ELSEWHERE: "yes"}, False),
        (WORKER, "Ingress", 34567, HEAD | {ELSEWHERE: "yes"}, False),
        (HEAD, "Ingress", 8265, STRANGER, False),
        (HEAD, "Ingress", 10001, CLIENT, False),
        (CLIENT, "Egress", 8265, HEAD, True),
        (CLIENT, "Egress", 6379, HEAD, False),
        (HEAD, "Egress", 6379, REDIS, True),
        (REDIS, "Ingress", 6379, HEAD, True),
        (REDIS, "Ingress", 6379, CLIENT, False),
        (REDIS, "Ingress", 6379, JOBS_HEAD, False),
        (REDIS, "Ingress", 6379, STRANGER, False),
        (STRANGER, "Egress", 443, None, False),
    ],
)
def test_the_network_lets_through_what_must_be_and_nothing_else(
    pod: dict[str, str], direction: str, port: int, peer: dict[str, str] | None, allowed: bool
) -> None:
    assert allows(build("base"), pod, direction, port, peer) is allowed


@needs_kubectl
def test_the_smoke_overlay_opens_its_own_store() -> None:
    store = {"app.kubernetes.io/component": "store"}
    manifests = build("overlays/smoke")

    for user in (HEAD, WORKER, CLIENT):
        assert allows(manifests, user, "Egress", 8333, store)
        assert allows(manifests, store, "Ingress", 8333, user)
    assert not allows(manifests, store, "Ingress", 8333, STRANGER)


@needs_kubectl
def test_the_demos_job_in_the_smoke_overlay_is_a_client_as_render_makes_them() -> None:
    (job,) = of_kind(build("overlays/smoke"), "Job")
    template = job["spec"]["template"]
    made = client_template(RenderOptions("x"), "demo", environment=token_environment())

    assert template["metadata"] == made["metadata"]
    own, expected = template["spec"], made["spec"]
    for name in set(expected) - {"containers", "volumes"}:
        assert own[name] == expected[name], name
    (container,), (expected_container,) = own["containers"], expected["containers"]
    assert container["securityContext"] == expected_container["securityContext"]
    assert container["envFrom"] == expected_container["envFrom"]
    assert [entry for entry in container["env"] if entry["name"].startswith("RAY_AUTH")] == expected_container["env"]
    for part, whole in (
        (expected_container["volumeMounts"], container["volumeMounts"]),
        (expected["volumes"], own["volumes"]),
    ):
        assert all(one in whole for one in part)


@needs_kubectl
@pytest.mark.parametrize("name", BUILDS)
def test_what_is_tidied_up_is_not_what_works(name: str) -> None:
    """Karpenter and the cluster autoscaler leave nodes with our pods alone; a store that forgets may go."""
    for manifest in build(name):
        for _, _, template in pod_templates(manifest):
            if manifest["metadata"]["name"] != "whisper-jobs-store":
                assert template["metadata"]["annotations"] == STAYING


def test_the_store_of_the_smoke_overlay_is_that_of_compose() -> None:
    """One of the two alone would be kept up to date."""
    found = [re.findall(r"docker\.io/chrislusf/\S+", (ROOT / place).read_text()) for place in (
        "docker/compose.yaml", "k8s/overlays/smoke/store.yaml",
    )]  # fmt: skip

    assert found[0]
    assert found[0] == found[1]


def test_the_version_in_the_manifests_and_the_documents_is_ours() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    places = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "k8s").rglob("*.yaml")]
    texts = [path.read_text() for path in places]

    found = {one for text in texts for one in re.findall(r"(?:whisper-jobs:|newTag: )([\d.]+)-c", text)}

    assert found == {version}


@needs_kubectl
def test_the_demos_job_in_the_smoke_overlay_does_what_make_demo_does() -> None:
    (job,) = of_kind(build("overlays/smoke"), "Job")
    script = job["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    makefile = (ROOT / "Makefile").read_text()

    for line in re.findall(r"\$\(BIN\)/(python -m jobs\.demo\..*|whisper-jobs manifest .*)", makefile):
        assert line in script
    assert (ROOT / "configs" / re.search(r"/opt/whisper-jobs/configs/(\S+)", script)[1]).is_file()  # type: ignore[index]
