"""What every pod of ours has: the restricted pod security standard, and what makes it dependable."""

from __future__ import annotations

import re

from service.kubernetes.manifest import Manifest, Problems

LEAST_GRACE_S = 90
"""A checkpoint and its upload lie between SIGTERM and SIGKILL."""

_SECRET = re.compile(r"(?i)(^|_)(token|secret|password|passwd|api_?key|access_?key)(_|$)")
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
    security = pod.get("securityContext") or {}
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"spec.{name}", "is forbidden by the restricted standard"
    for volume in pod.get("volumes") or []:
        if not _RESTRICTED_VOLUMES & set(volume):
            yield f"spec.volumes.{volume.get('name')}", "is of a kind that the restricted standard forbids"
    if "automountServiceAccountToken" not in pod:
        yield "spec.automountServiceAccountToken", "is not set: say false, or why not"
    if on_ray and pod.get("terminationGracePeriodSeconds", 30) < LEAST_GRACE_S:
        text = f"is below {LEAST_GRACE_S}: a step, a checkpoint and its upload lie between SIGTERM and SIGKILL"
        yield "spec.terminationGracePeriodSeconds", text
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            yield from container_problems(f"spec.{kind}[{index}]", container, security)
            yield from _size_problems(f"spec.{kind}[{index}].resources", container.get("resources") or {})
            if on_ray and kind == "containers" and not ("readinessProbe" in container and "livenessProbe" in container):
                yield f"spec.{kind}[{index}]", "has no probes"


def container_problems(place: str, container: Manifest, security: Manifest) -> Problems:
    """Of a container, at its place.

    Args:
        place: where it is.
        container: its securityContext, ports and variables.
        security: of its pod.
    """
    own, where = container.get("securityContext") or {}, f"{place}.securityContext"
    merged, capabilities = security | own, own.get("capabilities") or {}
    if own.get("allowPrivilegeEscalation") is not False:
        yield where, "must have allowPrivilegeEscalation: false"
    if own.get("privileged"):
        yield where, "must not be privileged"
    if "ALL" not in (capabilities.get("drop") or []) or set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield where, "must drop all capabilities"
    if merged.get("runAsNonRoot") is not True or merged.get("runAsUser") == 0:
        yield where, "must run as another user than root"
    if (merged.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield where, "must have a seccomp profile"
    if own.get("readOnlyRootFilesystem") is not True:
        yield where, "should have readOnlyRootFilesystem: true"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield f"{place}.ports", "must not take a port of the node"
    for entry in container.get("env") or []:
        if entry.get("value") and _SECRET.search(entry["name"]) and not _REFERENCE.search(entry["name"]):
            yield f"{place}.env.{entry['name']}", "is written out; refer to a secret (valueFrom.secretKeyRef)"


def _size_problems(place: str, resources: Manifest) -> Problems:
    for kind in ("requests", "limits"):
        if missing := {"cpu", "memory"} - set(resources.get(kind) or {}):
            yield f"{place}.{kind}", f"lack {', '.join(sorted(missing))}"
