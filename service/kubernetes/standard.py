"""What every pod of ours has: the restricted pod security standard, and what makes it dependable."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Manifest = dict[str, Any]
Problems = Iterator[tuple[str, str]]

LEAST_GRACE_S = 90
"""A checkpoint and its upload lie between SIGTERM and SIGKILL."""

_SECRET = re.compile(r"(?i)(token|secret|password|passwd|api_?key|access_?key)")
_REFERENCE = re.compile(r"(?i)(_path|_file|_mode|_address|_uri|_url)$")
_RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


def pod_problems(template: Manifest, *, on_ray: bool) -> Problems:
    """Of a pod's template.

    Args:
        template: as a Deployment, a Job or a group of Ray nodes has it.
        on_ray: whether it is a Ray node, which has work to save when it must go.
    """
    pod = template.get("spec") or {}
    yield from _restricted(pod)
    if "automountServiceAccountToken" not in pod:
        yield "spec.automountServiceAccountToken", "is not set: say false, or why not"
    if on_ray and pod.get("terminationGracePeriodSeconds", 30) < LEAST_GRACE_S:
        text = f"is below {LEAST_GRACE_S}: a step, a checkpoint and its upload lie between SIGTERM and SIGKILL"
        yield "spec.terminationGracePeriodSeconds", text
    for index, container in enumerate(pod.get("containers") or []):
        place, resources = f"spec.containers[{index}]", container.get("resources") or {}
        for kind in ("requests", "limits"):
            if missing := {"cpu", "memory"} - set(resources.get(kind) or {}):
                yield f"{place}.resources.{kind}", f"lack {', '.join(sorted(missing))}"
        if on_ray and not ("readinessProbe" in container and "livenessProbe" in container):
            yield place, "has no probes"
        for entry in container.get("env") or []:
            written = entry.get("value") and _SECRET.search(entry["name"]) and not _REFERENCE.search(entry["name"])
            if written:
                yield f"{place}.env.{entry['name']}", "is written out; refer to a secret (valueFrom.secretKeyRef)"


def _restricted(pod: Manifest) -> Problems:
    whole = pod.get("securityContext") or {}
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"spec.{name}", "is forbidden by the restricted standard"
    for volume in pod.get("volumes") or []:
        if not _RESTRICTED_VOLUMES & set(volume):
            yield f"spec.volumes.{volume.get('name')}", "is of a kind that the restricted standard forbids"
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            place, own = f"spec.{kind}[{index}].securityContext", container.get("securityContext") or {}
            merged = whole | own
            capabilities = own.get("capabilities") or {}
            if own.get("allowPrivilegeEscalation") is not False:
                yield place, "must have allowPrivilegeEscalation: false"
            if own.get("privileged"):
                yield place, "must not be privileged"
            if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
                yield place, "must drop all capabilities"
            if merged.get("runAsNonRoot") is not True or merged.get("runAsUser") == 0:
                yield place, "must run as another user than root"
            if (merged.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
                yield place, "must have a seccomp profile"
            if own.get("readOnlyRootFilesystem") is not True:
                yield place, "should have readOnlyRootFilesystem: true"
            for port in container.get("ports") or []:
                if port.get("hostPort"):
                    yield f"spec.{kind}[{index}].ports", "must not take a port of the node"
