"""A spec as manifests: a RayJob with a cluster of its own, or a CronJob that submits it to one that stays."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass

from service.client.record import MARK
from service.client.stop import LONGEST_GRACE_S
from service.client.submit import PROGRAM
from service.errors import Fault, SpecError
from service.kubernetes.cluster import API, job_cluster
from service.kubernetes.manifest import Manifest
from service.kubernetes.names import LONGEST_RAYJOB, QUEUE_LABEL, label_of
from service.kubernetes.options import DEFAULT_CLUSTER, DEFAULT_TIME_ZONE, RenderOptions
from service.kubernetes.pods import SPEC_FILE, SPEC_FOLDER, client_template, labels, token_environment
from service.kubernetes.sizes import workers_of
from service.requirements import DISTRIBUTION
from service.spec.counted import counted
from service.spec.flags import CONFIG_FLAG, NO_WARNINGS_FLAG
from service.spec.job import JobSpec
from service.spec.paths import MODELS, PATHS, is_uri
from service.spec.whisper_dims import is_folder

LONGEST_SCHEDULED = 31
"""A CronJob's name: with the minute that Kubernetes adds it names each night's job, and those have 40 characters."""

LARGEST_SPEC = 900_000
"""Bytes; a ConfigMap holds 1 MiB."""

RETRIES = 1
"""How often a job that has failed, or was lost, is begun again with a new cluster: it goes on from its storage."""

SUBMITTER_RETRIES = 2
"""How often one that was lost with its head is submitted again to the same cluster, whose head KubeRay makes anew."""

POD_RETRIES = 3
"""How often the pod of a scheduled job's client is begun again: it attaches to the job."""

BEGIN_S = 3600
"""How long a cluster may take for all of its pods to run: with some of them missing it holds the others for nothing."""

KEEP_S = 600
"""How long a job's cluster stays after its end, for whoever wants to look at its logs."""

_PLAIN = re.compile(r"[\w./:@+=,%~-]*", re.ASCII)
"""What a shell leaves as it is: KubeRay hands the metadata through one."""


@dataclass(frozen=True)
class Rendered:
    """Manifests, in the order in which they are applied, and what the user should know of them."""

    manifests: list[Manifest]
    notes: list[str]

    def to_yaml(self) -> str:
        """For `kubectl apply -f -`."""
        return to_yaml(self.manifests)


def to_yaml(manifests: list[Manifest]) -> str:
    """Manifests as one stream of YAML."""
    import yaml

    return str(yaml.safe_dump_all(manifests, sort_keys=False, allow_unicode=True, width=110))


def render(spec: JobSpec, options: RenderOptions) -> Rendered:
    """Make the manifests of a job.

    Args:
        spec: checked; what it names is where the pods see it.
        options: what they need beside it.

    Raises:
        SpecError: with all that keeps the job from running there.
    """
    faults = [*options.faults(), *_faults(spec, options)]
    if faults:
        raise SpecError(faults)
    notes = options.notes
    if options.schedule is not None:
        name = label_of(spec.title, LONGEST_SCHEDULED)
        config = _config_map(spec, options, name)
        asked = spec.resources
        room = " and ".join(
            counted(count, unit)
            for count, unit in ((asked.cpus_per_worker, "CPU"), (asked.gpus_per_worker, "GPU"))
            if count
        )
        notes.append(f"the RayCluster's worker pods must have {room} for each worker")
        return Rendered([config, _cron_job(options, name, config)], notes)
    name = label_of(spec.job_id, LONGEST_RAYJOB)
    if name != spec.job_id:
        notes.append(f"the RayJob is called {name}; its results go to {spec.root}")
    config = _config_map(spec, options, name)
    workers = workers_of(spec, options.memory)
    cluster = job_cluster(options, workers, config["metadata"]["name"])
    return Rendered([config, _ray_job(spec, options, name, cluster)], notes + list(workers.notes))


def _faults(spec: JobSpec, options: RenderOptions) -> Iterator[Fault]:
    for setting, path in _places(spec):
        if not is_uri(path) and not any(mount.holds(path) for mount in options.mounts):
            text = "is a path that the pods do not see; give a URI, --upload it, or --mount the claim that holds it"
            yield Fault(setting, text, path)
    if spec.resources.workers == 0 and spec.kind != "search":
        text = "does the work in the job's own process, on the head, which has no CPUs or GPUs for it; give 1 or more"
        yield Fault("resources.workers", text, 0)
    if options.schedule is not None and spec.training.outdir:
        text = (
            "is one root for all nights, and a job that has succeeded there is not done again; leave it out and give "
            "storage.uri, under which each gets a root of its own"
        )
        yield Fault("training.outdir", text, spec.training.outdir)
    if options.schedule is not None and spec.resources.gpus_per_worker is None:
        text = (
            "is not set, and a cluster whose workers come with the work has no GPU yet to go by; give 1, or 0 for CPUs"
        )
        yield Fault("resources.gpus_per_worker", text)
    size = len(spec.to_json().encode())
    if size > LARGEST_SPEC:
        text = (
            f"has {size:,} bytes as JSON, and a ConfigMap holds {LARGEST_SPEC:,}; shorten search.space or the patterns"
        )
        yield Fault("the spec", text)


def _places(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Files and folders that a job reads and writes."""
    for setting in PATHS + MODELS:
        section, name = setting.split(".")
        value = getattr(getattr(spec, section), name)
        if value is None or (setting in MODELS and not is_uri(value) and not is_folder(value)):
            continue  # a model of the hub
        if setting == "storage.uri" and spec.training.outdir:
            continue
        yield setting, value


def _config_map(spec: JobSpec, options: RenderOptions, name: str) -> Manifest:
    """It cannot be changed, and so has another name with another content: also where a spec differs in something that
    makes no other job of it."""
    digest = hashlib.sha256(spec.to_json().encode()).hexdigest()[:8]
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-{digest}", "namespace": options.namespace, "labels": labels("spec")},
        "immutable": True,
        "data": {SPEC_FILE: spec.to_json()},
    }


def _ray_job(spec: JobSpec, options: RenderOptions, name: str, cluster: Manifest) -> Manifest:
    job_labels = labels("job") | ({QUEUE_LABEL: options.queue} if options.queue else {})
    known = {
        MARK: importlib.metadata.version(DISTRIBUTION),
        "job_id": spec.job_id,
        "name": spec.name or "",
        "kind": spec.kind,
        "spec_sha256": spec.sha256,
        "root": spec.root,
    }
    return {
        "apiVersion": API,
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": options.namespace, "labels": job_labels},
        "spec": {
            "entrypoint": f"{PROGRAM} {CONFIG_FLAG} {SPEC_FOLDER}/{SPEC_FILE} {NO_WARNINGS_FLAG}",
            "metadata": {key: value for key, value in known.items() if value and _PLAIN.fullmatch(value)},
            "runtimeEnvYAML": to_yaml([{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(LONGEST_GRACE_S)}}]),
            "submissionMode": "K8sJobMode",
            # KubeRay's own template of a submitter is refused by the restricted pod security standard.
            "submitterPodTemplate": client_template(options, "ray-job-submitter"),
            "submitterConfig": {"backoffLimit": SUBMITTER_RETRIES},
            "backoffLimit": RETRIES,
            "preRunningDeadlineSeconds": max(BEGIN_S, round(spec.resources.wait_s)),
            **({"suspend": True} if options.queue else {}),
            "shutdownAfterJobFinishes": True,
            # Kueue gives the room to the next one at the job's end, not at its pods'.
            "ttlSecondsAfterFinished": 0 if options.queue else KEEP_S,
            "rayClusterSpec": cluster,
        },
    }


def _cron_job(options: RenderOptions, name: str, config: Manifest) -> Manifest:
    own_name = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    command = ["whisper-jobs", "submit", f"{SPEC_FOLDER}/{SPEC_FILE}"]
    # A pod that is begun again has the same name, and so attaches to the job of the one before it.
    command += [
        "--set",
        "name=$(JOB_NAME)",
        "--wait",
        "--address",
        f"http://{options.cluster or DEFAULT_CLUSTER}-head-svc:8265",
    ]
    template = client_template(
        options,
        "submit",
        command=command,
        environment=[{"name": "JOB_NAME", "valueFrom": own_name}, *token_environment()],
        config_map=config["metadata"]["name"],
    )
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": name, "namespace": options.namespace, "labels": labels("schedule")},
        "spec": {
            "schedule": options.schedule,
            "timeZone": options.time_zone or DEFAULT_TIME_ZONE,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "suspend": options.suspend,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {
                "metadata": {"labels": labels("schedule")},
                "spec": {
                    "backoffLimit": POD_RETRIES,
                    "podFailurePolicy": {"rules": _failure_rules()},
                    "template": template,
                },
            },
        },
    }


def _failure_rules() -> list[Manifest]:
    """A pod that was taken away does not count; one whose input is bad would fail again."""
    bad_input = {"containerName": "submit", "operator": "In", "values": [SpecError.exit_code]}
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": bad_input},
    ]
