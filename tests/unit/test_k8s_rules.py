"""Broken manifests are refused: by the schemas, by the CRDs and their rules, and by what no schema says."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from manifests import CRDS, HOW_TO_GET_THEM, has_crds, needs_crds, problems

from service.cli.main import cli
from service.kubernetes import check, unknown_kinds

K8S = Path(__file__).parents[2] / "k8s"
HEAD = "spec.headGroupSpec.template.spec"
WORKER = "spec.workerGroupSpecs.0.template.spec"
JOB_HEAD = f"spec.rayClusterSpec.{HEAD.removeprefix('spec.')}"
GONE = object()

Manifest = dict[str, Any]


def load(name: str, kind: str) -> Manifest:
    found: Manifest = next(one for one in yaml.safe_load_all((K8S / name).read_text()) if one["kind"] == kind)
    return found


GOOD = {
    "cluster": load("base/raycluster.yaml", "RayCluster"),
    "train": load("examples/train.yaml", "RayJob"),
    "queued": load("examples/queued-train.yaml", "RayJob"),
    "nightly": load("examples/nightly-search.yaml", "CronJob"),
    "redis": load("base/redis.yaml", "StatefulSet"),
    "policy": load("base/network-policies.yaml", "NetworkPolicy"),
}


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """A copy in which one thing is another; GONE takes it out."""
    broken = copy.deepcopy(manifest)
    *way, last = path.split(".")
    place: Any = broken
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
    key: Any = int(last) if isinstance(place, list) else last.replace("/", ".")
    if value is GONE:
        del place[key]
    elif callable(value):
        place[key] = value(place.get(key) if isinstance(place, dict) else place[key])
    else:
        place[key] = value
    assert broken != manifest
    return broken


def plus(*more: Any) -> Callable[[Any], Any]:
    return lambda present: [*(present or []), *more]


def env(name: str, value: str = "x") -> Callable[[Any], Any]:
    return plus({"name": name, "value": value})


@pytest.mark.parametrize("name", GOOD)
def test_what_is_shipped_breaks_no_rule(name: str) -> None:
    assert check([GOOD[name]]) == []
    if name in ("nightly", "redis", "policy") or has_crds():
        assert problems(GOOD[name]) == []


# KubeRay's operator takes these and then does nothing with them


@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("cluster", "metadata.name", "x" * 54, "53"),
        ("cluster", "metadata.name", "2nd", "beginning with a letter"),
        ("cluster", f"{HEAD}.containers", [], "no container"),
        ("cluster", f"{WORKER}.containers", [], "no container"),
        ("cluster", "spec.headGroupSpec.resources", {"CPU": "1"}, "exclude each other"),
        ("cluster", "spec.headGroupSpec.rayStartParams.labels", "a=b", "labels"),
        ("cluster", "spec.workerGroupSpecs.0.minReplicas", 9, "above maxReplicas"),
        ("cluster", "spec.workerGroupSpecs.0.minReplicas", -1, "negative"),
        ("cluster", "spec.workerGroupSpecs.0.suspend", True, "autoscaler"),
        ("cluster", "spec.workerGroupSpecs", lambda groups: [*groups, *groups], "twice"),
        ("cluster", f"{HEAD}.restartPolicy", "Always", "Never"),
        ("cluster", f"{WORKER}.restartPolicy", "OnFailure", "Never"),
        ("cluster", f"{HEAD}.containers.0.env", env("RAY_enable_autoscaler_v2", "1"), "exclude each other"),
        ("cluster", f"{HEAD}.containers.0.env", env("RAY_REDIS_ADDRESS"), "redisAddress"),
        ("cluster", f"{HEAD}.containers.0.env", env("REDIS_PASSWORD"), "redisPassword"),
        ("cluster", "spec.headGroupSpec.rayStartParams.redis-password", "x", "gcsFaultToleranceOptions"),
        ("cluster", "metadata.annotations", {"ray.io/ft-enabled": "true"}, "exclude each other"),
        ("cluster", "metadata.annotations", {"ray.io/external-storage-namespace": "x"}, "exclude each other"),
        ("cluster", "spec.gcsFaultToleranceOptions.storage", {"size": "1Gi"}, "rocksdb"),
        ("cluster", "spec.gcsFaultToleranceOptions.backend", "rocksdb", "settings of Redis"),
        ("cluster", "spec.gcsFaultToleranceOptions.redisPassword", {"value": "hunter2"}, "refer to a secret"),
        ("cluster", "spec.autoscalerOptions.idleTimeoutSeconds", -1, "negative"),
        ("cluster", "spec.rayVersion", GONE, "must be given for a token"),
        ("cluster", "spec.rayVersion", "2.40.0", "2.52.0"),
        ("cluster", "spec.authOptions", {"mode": "disabled"}, "is not token"),
        ("cluster", "spec.authOptions.enableK8sTokenAuth", True, "exclude each other"),
        ("cluster", "spec.networkPolicy", {"mode": "DenyAll"}, "feature gate RayClusterNetworkPolicy"),
        ("cluster", "spec.tlsOptions", {"enabled": True}, "feature gate RayClusterMTLS"),
        ("cluster", "spec.headGroupSpec.labels", {"a b": "c"}, "no label"),
        ("cluster", "spec.workerGroupSpecs.0.labels", {"a": "c d"}, "no label"),
        ("cluster", "spec.headGroupSpec.rayStartParams.redis-username", "x", "redisUsername"),
        ("train", f"{JOB_HEAD}.containers.0.env", env("REDIS_USERNAME"), "redisUsername"),
        ("cluster", "spec.autoscalerOptions.env", env("KUBERAY_GEN_AUTOSCALER_START_CMD"), "KubeRay's own"),
        ("cluster", "spec.autoscalerOptions.securityContext", GONE, "capabilities"),
        ("cluster", "spec.autoscalerOptions.env", env("MY_API_KEY", "hunter2"), "refer to a secret"),
        ("train", "metadata.name", "x" * 48, "47"),
        ("train", "metadata.name", "Turbo", "small letters"),
        ("train", "spec.rayClusterSpec", GONE, "neither"),
        ("train", "spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", GONE, "needs minReplicas"),
        ("train", "spec.rayClusterSpec.workerGroupSpecs.0.idleTimeoutSeconds", 5, "autoscaler v2"),
        ("train", f"{JOB_HEAD}.containers.0.env", env("RAY_enable_autoscaler_v2", "1"), "without"),
        ("train", f"{JOB_HEAD}.containers.0.env", env("RAY_REDIS_ADDRESS"), "without gcsFaultToleranceOptions"),
        ("train", "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished"),
        ("train", "spec.ttlSecondsAfterFinished", -1, "negative"),
        ("train", "spec.deletionStrategy", {"deletionRules": [{}]}, "exclude each other"),
        ("train", "spec.clusterSelector", {"other": "x"}, "names no cluster"),
        ("train", "spec.clusterSelector", {"ray.io/cluster": "x"}, "begun again"),
        ("train", "spec.submissionMode", "SidecarMode", "no submitterPodTemplate"),
        ("train", "spec.submissionMode", "InteractiveMode", "InteractiveMode"),
        ("train", "spec.backoffLimit", -1, "below 0"),
        ("train", "spec.activeDeadlineSeconds", 0, "below 1"),
        ("train", "spec.runtimeEnvYAML", "[1, 2", "no YAML"),
        ("train", "spec.runtimeEnvYAML", "just words", "no YAML"),
        ("train", "spec.rayClusterSpec.upgradeStrategy", {"type": "Recreate"}, "no RayJob makes"),
        ("queued", "spec.suspend", GONE, "must be true for Kueue"),
        ("queued", "spec.shutdownAfterJobFinishes", GONE, "never given back"),
        ("queued", "spec.deletionStrategy", {"onSuccess": {}, "onFailure": {}}, "not for Kueue"),
        ("queued", "spec.rayClusterSpec.enableInTreeAutoscaling", True, "fixed number of pods"),
        ("queued", "spec.rayClusterSpec.workerGroupSpecs", lambda groups: groups * 7, "more than the 6"),
        ("queued", "spec.rayClusterSpec.workerGroupSpecs.0.groupName", "submitter", "calls another one"),
        ("queued", "spec.ttlSecondsAfterFinished", 600, "must be 0"),
        ("nightly", "metadata.name", "x" * 53, "52"),
        ("nightly", "spec.schedule", "every night", "fields"),
        ("nightly", "spec.concurrencyPolicy", "Allow", "Forbid"),
    ],
)
def test_what_the_operator_or_kueue_would_refuse_is_named(name: str, path: str, value: Any, said: str) -> None:
    faults = check([changed(GOOD[name], path, value)])

    assert any(said in str(fault) for fault in faults), faults
    assert all(fault.where.startswith(f"{GOOD[name]['kind']}/") for fault in faults)


def test_a_sidecar_submitter_wants_a_head_that_is_not_begun_again() -> None:
    broken = changed(
        changed(GOOD["train"], "spec.submissionMode", "SidecarMode"), f"{JOB_HEAD}.restartPolicy", "Always"
    )

    assert any("must be Never in SidecarMode" in str(fault) for fault in check([broken]))


@pytest.mark.parametrize("name", ["cluster", "queued", "nightly", "redis"])
def test_whatever_a_manifest_holds_it_is_checked_without_a_crash(name: str) -> None:
    for path in paths(GOOD[name]):
        for value in (None, "text", 7, [], {}, [None], {"a": None}):
            with contextlib.suppress(AssertionError):  # it was that already
                check([changed(GOOD[name], path, value)])
        check([changed(GOOD[name], path, GONE)])


def paths(value: Any, prefix: str = "") -> list[str]:
    """All places in a manifest whose names hold no dot."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, one in inner:
        if "." not in str(key):
            found += [f"{prefix}{key}", *paths(one, f"{prefix}{key}.")]
    return [path for path in found if path not in ("kind", "apiVersion")]


def test_pods_of_other_kinds_are_looked_at_and_unknown_kinds_are_named() -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p"},
        "spec": {"hostNetwork": True, "containers": []},
    }
    nightly = {"kind": "RayCronJob", "metadata": {"name": "n"}, "spec": {"jobTemplate": GOOD["train"]["spec"]}}
    bad = changed(nightly, "spec.jobTemplate.submitterPodTemplate.spec.securityContext.runAsUser", 0)

    assert "hostNetwork" in str(check([pod]))
    assert check([nightly]) == []
    assert "another user than root" in str(check([bad]))
    assert unknown_kinds([pod, nightly, {"kind": "RayService"}, GOOD["policy"]]) == ["RayService"]


def test_a_variable_that_only_sounds_secret_and_more_dropped_capabilities_are_allowed() -> None:
    fine = changed(GOOD["cluster"], f"{HEAD}.containers.0.env", env("TOKENIZERS_PARALLELISM", "false"))
    fine = changed(fine, f"{HEAD}.containers.0.securityContext.capabilities.drop", ["ALL", "NET_RAW"])

    assert check([fine]) == []


# Every pod


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (f"{WORKER}.securityContext.runAsNonRoot", GONE, "another user than root"),
        (f"{WORKER}.securityContext.runAsUser", 0, "another user than root"),
        (f"{WORKER}.securityContext.seccompProfile", GONE, "seccomp"),
        (f"{WORKER}.containers.0.securityContext.allowPrivilegeEscalation", GONE, "allowPrivilegeEscalation"),
        (f"{WORKER}.containers.0.securityContext.capabilities", {"drop": ["NET_RAW"]}, "capabilities"),
        (f"{WORKER}.containers.0.securityContext.capabilities.add", ["SYS_PTRACE"], "capabilities"),
        (f"{WORKER}.containers.0.securityContext.privileged", True, "privileged"),
        (f"{WORKER}.containers.0.securityContext.readOnlyRootFilesystem", GONE, "readOnlyRootFilesystem"),
        (f"{WORKER}.containers.0.ports", plus({"containerPort": 1, "hostPort": 1}), "port of the node"),
        (f"{WORKER}.hostNetwork", True, "hostNetwork"),
        (f"{WORKER}.volumes", plus({"name": "host", "hostPath": {"path": "/"}}), "forbids"),
        (f"{WORKER}.automountServiceAccountToken", GONE, "say false"),
        (f"{WORKER}.terminationGracePeriodSeconds", 30, "below 90"),
        (f"{WORKER}.terminationGracePeriodSeconds", GONE, "below 90"),
        (f"{WORKER}.containers.0.resources.limits.memory", GONE, "lack memory"),
        (f"{WORKER}.containers.0.resources", GONE, "lack cpu, memory"),
        (f"{HEAD}.containers.0.livenessProbe", GONE, "no probes"),
        (f"{HEAD}.containers.0.env", env("RAY_AUTH_TOKEN", "hunter2"), "refer to a secret"),
        (f"{HEAD}.containers.0.env", env("AWS_SECRET_ACCESS_KEY", "hunter2"), "refer to a secret"),
    ],
)
def test_a_pod_that_is_not_safe_or_not_dependable_is_named(path: str, value: Any, said: str) -> None:
    faults = check([changed(GOOD["cluster"], path, value)])

    assert any(said in str(fault) for fault in faults), faults
    assert "hunter2" not in " ".join(map(str, faults))


def test_a_secret_that_is_written_out_is_refused_and_not_shown() -> None:
    (fault,) = check(
        [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "hunter2"}}]
    )

    assert "kubectl create secret" in str(fault)
    assert "hunter2" not in str(fault)


# The schemas


@needs_crds
@pytest.mark.parametrize(
    ("name", "path", "value", "said"),
    [
        ("cluster", "spec.headGroupSpec.templat", {}, "templat"),
        ("cluster", f"{HEAD}.containers.0.imagePullPolcy", "Always", "imagePullPolcy"),
        ("cluster", "spec.headGroupSpec", GONE, "headGroupSpec"),
        ("cluster", "spec.workerGroupSpecs.0.replicas", "two", "two"),
        ("cluster", "spec.workerGroupSpecs.0.replicas", 2**31, "maximum"),
        ("cluster", "spec.headGroupSpec.rayStartParams.num-cpus", 0, "not of type 'string'"),
        ("cluster", "spec.authOptions.mode", "password", "password"),
        ("cluster", "spec.autoscalerOptions.version", "v3", "v3"),
        ("cluster", "spec.managedBy", "me", "managedBy field value must be"),
        ("cluster", f"{HEAD}.containers.0.resources.limits.memory", "much", "much"),
        ("cluster", f"{HEAD}.containers.0.env", env("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"), "same name"),
        ("train", "spec.deletionStrategy", {"onSuccess": {"policy": "DeleteCluster"}}, "BOTH onSuccess and onFailure"),
        (
            "train",
            "spec.deletionStrategy",
            {"deletionRules": [{"policy": "DeleteCluster", "condition": {}}]},
            "requires",
        ),
        ("train", "spec.backoffLimit", "many", "many"),
        ("train", "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.name", GONE, "name"),
        ("train", "spec.preRunningDeadlineSeconds", 0, "minimum"),
        ("train", "spec.enrtypoint", "x", "enrtypoint"),
    ],
)
def test_what_kuberays_crds_do_not_allow_is_refused(name: str, path: str, value: Any, said: str) -> None:
    found = problems(changed(GOOD[name], path, value))

    assert any(said in problem for problem in found), found


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("nightly", "spec.concurrencyPolcy", "Forbid"),
        ("nightly", "spec.jobTemplate.spec.template.spec.containers.0.resources.limits.memory", []),
        ("nightly", "spec.schedule", GONE),
        ("redis", "spec.selector", GONE),
        ("redis", "spec.replicas", "one"),
        ("redis", "spec.template.spec.securityContext.seccompProfil", {}),
        ("policy", "spec.podSelecter", {}),
    ],
)
def test_what_kubernetes_own_schemas_do_not_allow_is_refused(name: str, path: str, value: Any) -> None:
    assert problems(changed(GOOD[name], path, value))


def test_without_crds_it_is_said_how_to_get_them() -> None:
    assert CRDS in HOW_TO_GET_THEM
    assert "KubeRay v1.7.0" in HOW_TO_GET_THEM


# The command


def run(*words: str, given: str | None = None) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["k8s", "check", *words], input=given)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_reads_a_file_or_the_standard_input() -> None:
    code, text, _ = run(str(K8S / "base/raycluster.yaml"))
    assert (code, "nothing to object to" in text) == (0, True)

    broken = changed(GOOD["cluster"], "spec.rayVersion", GONE)
    listed = {"apiVersion": "v1", "kind": "List", "items": [GOOD["train"], broken]}
    code, text, _ = run("-", given=yaml.safe_dump(listed))
    assert code == 2
    assert text.startswith("RayCluster/whisper-jobs spec.rayVersion: ")

    code, text, _ = run("-", "-o", "json", given=yaml.safe_dump(broken))
    assert code == 2
    assert json.loads(text)["faults"][0]["where"] == "RayCluster/whisper-jobs spec.rayVersion"


@pytest.mark.parametrize("content", ["", "a: [", "just words", "- 1\n- 2\n", "a: 1\n"])
def test_what_is_no_manifest_is_refused_with_a_message(content: str, tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(content)

    code, text, errors = run(str(path))

    assert (code, text) == (2, "")
    assert errors.startswith("error: FILE: ")
    assert run(str(tmp_path / "nowhere.yaml"))[0] == 2


@pytest.mark.parametrize("first", ["a: 1", "just words"])
def test_of_a_file_with_another_document_in_it_that_one_is_named(first: str) -> None:
    code, _, errors = run("-", given=f"{first}\n---\n{yaml.safe_dump(GOOD['cluster'])}")

    assert code == 2
    assert errors == 'error: FILE: "-" holds what is no object of Kubernetes: it has no kind (number 1 of 2)\n'
