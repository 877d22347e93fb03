"""What the client has done on a cluster: `python -m jobs.errands check | signal`. The answer is one line of JSON.

Nothing but the standard library is imported before it is known that the rest is there: that it is not, in these
versions, is the first thing to tell.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ANSWER = "whisper-jobs-says "
"""How the line begins that the client looks for."""

DISTRIBUTION, EXTRA = "whisper-jobs", "jobs"
_MOST_NODES = 64
_NODE_S = 90.0
_SHELLS = ("sh", "dash", "bash")
_KEPT_PACKAGES = ("ray", "torch", "transformers", "peft")

Found = dict[str, Any]
"""One fault or note: {"kind": "version" | "resources" | "storage" | "path" | "node", "where", "message"} and, where
there are any, "value" and "seen_from", the nodes that say so."""


def main(arguments: list[str] | None = None) -> int:
    """Run one errand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.errands", description=__doc__)
    errands = parser.add_subparsers(dest="errand", required=True)
    check = errands.add_parser("check", help="What this cluster has, and whether it can hold a job.")
    check.add_argument("--config", help="The job's spec, resolved.")
    check.add_argument("--brought", nargs="+", default=[], help="Settings whose files are still to come.")
    end = errands.add_parser("signal", help="Send a signal to the program of a job.")
    end.add_argument("job")
    end.add_argument("name", choices=("TERM", "KILL"))
    end.add_argument("--node", help="Id of the node that it runs on.")
    options = parser.parse_args(arguments)
    if options.errand == "check":
        answer = check_cluster(options.config, options.brought)
    else:
        answer = signal_job(options.job, options.name, options.node)
    print(ANSWER + json.dumps(answer, ensure_ascii=False), flush=True)
    return 0


def check_cluster(config: str | None, brought: list[str]) -> dict[str, Any]:
    """What the cluster has, and what keeps it from running a job.

    Args:
        config: path of the job's spec; None: no job in particular.
        brought: settings whose files are not there yet, but will be.

    Returns:
        {"python", "packages", "nodes", "can_grow", "faults": [...], "notes": [...]}.
    """
    answer: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:3])), "packages": _versions(), "nodes": []}
    answer |= {"can_grow": False, "faults": list(_version_faults()), "notes": []}
    if not answer["faults"]:
        with _joined():
            answer |= _look_around()
            if config is not None:
                spec = Path(config).read_text(encoding="utf-8")
                answer["faults"] = [*_resource_faults(spec, answer), *_node_faults(spec, answer["notes"], brought)]
    return answer


def _versions() -> dict[str, str]:
    found = {}
    for name in _KEPT_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _version_faults() -> Iterator[Found]:
    """Python and every package of the extra `jobs`, against what this version of whisper-jobs asks for."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        yield {"kind": "version", "where": "packaging", "message": f"is not installed on the cluster; {_INSTALL}"}
        return
    described = importlib.metadata.metadata(DISTRIBUTION)
    here, wanted = ".".join(map(str, sys.version_info[:3])), described["Requires-Python"] or ""
    if not SpecifierSet(wanted).contains(here):
        text = f"whisper-jobs needs {wanted}; start the cluster from an image with such a Python"
        yield {"kind": "version", "where": f"the cluster's Python {here}", "message": text}
    missing = []
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": EXTRA}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            text = f"is {version} on the cluster, and {requirement.specifier} is needed; {_INSTALL}"
            yield {"kind": "version", "where": requirement.name, "message": text}
    if "ray" in missing:
        text = (
            "has no Ray: it is not the one that the cluster runs in; start the nodes with that one first on their PATH"
        )
        yield {"kind": "version", "where": f"the cluster's `python`, {sys.executable},", "message": text}
    elif missing:
        text = f"{'is' if len(missing) == 1 else 'are'} not installed on the cluster; {_INSTALL}"
        yield {"kind": "version", "where": ", ".join(missing), "message": text}


_INSTALL = f'pip install "{DISTRIBUTION}[{EXTRA}]" in the image of its nodes'


@contextlib.contextmanager
def _joined() -> Iterator[None]:
    import logging

    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(address=os.environ.get("RAY_ADDRESS") or "auto", log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _look_around() -> dict[str, Any]:
    import ray

    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = dict(node["Resources"])
        kinds = [name.split(":", 1)[1] for name in resources if name.startswith("accelerator_type:")]
        nodes.append(
            {
                "id": node["NodeID"],
                "address": node["NodeManagerAddress"],
                "is_head": "node:__internal_head__" in resources,
                "cpus": resources.get("CPU", 0.0),
                "gpus": resources.get("GPU", 0.0),
                "gpu": kinds[0] if kinds else None,
                "memory_bytes": int(resources.get("memory", 0)),
            }
        )
    return {"nodes": nodes, "can_grow": _can_grow()}


def _can_grow() -> bool:
    """Whether an autoscaler has told the cluster of nodes that it may add."""
    from ray._private.state import state  # where Ray's own libraries look

    return bool(state.get_max_resources_from_cluster_config())


def _resource_faults(spec: str, answer: dict[str, Any]) -> Iterator[Found]:
    from dataclasses import replace

    from jobs.cluster.resources import missing_resources, resources_for
    from service.spec.counted import counted
    from service.spec.job import JobSpec

    job = JobSpec.model_validate_json(spec)
    needed = resources_for(job)
    if not (missing := missing_resources(needed)):
        return
    where, text = "resources", f"{counted(needed.workers, 'worker asks', 'workers ask')} for {missing}"
    fewest = job.resources.min_workers
    fits = fewest is not None and not missing_resources(replace(needed, workers=fewest))
    if answer["can_grow"] or fits:
        then = f"then {fewest} or more begin" if fits else "the autoscaler may add nodes"
        message = f"{text}; the job waits for them as resources.wait_s says ({job.resources.wait_s:g} s), {then}"
        answer["notes"].append({"kind": "resources", "where": where, "message": message})
        return
    way_out = "lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker, or add nodes"
    yield {"kind": "resources", "where": where, "message": f"{text}, and the cluster has no more; {way_out}"}


def _node_faults(spec: str, notes: list[Found], brought: list[str]) -> Iterator[Found]:
    """What the nodes themselves say of a job's files and of the place of its results: each fault once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > _MOST_NODES:
        text = f"{_MOST_NODES} of {len(nodes)} nodes were asked"
        notes.append({"kind": "node", "where": "the cluster", "message": text})
    look = ray.remote(num_cpus=0, max_retries=0)(look_from_node)
    mark = secrets.token_hex(8)
    with _shared_file(spec, mark) as found:
        yield from found
        calls = {}
        for node in nodes[:_MOST_NODES]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            # What is read is read where there are CPUs; results go through every node, the head with its driver too.
            reads = node["Resources"].get("CPU", 0) > 0
            calls[look.options(scheduling_strategy=here).remote(spec, mark, reads, brought)] = node[
                "NodeManagerAddress"
            ]
        ready, silent = ray.wait(list(calls), num_returns=len(calls), timeout=_NODE_S)
        for call in silent:
            text = f"did not answer within {_NODE_S:.0f} s; look at it, or take it out of the cluster"
            yield {"kind": "node", "where": f"node {calls[call]}", "message": text}
        by_fault: dict[str, tuple[Found, list[str]]] = {}
        for call in ready:
            try:
                said = ray.get(call)
            except ray.exceptions.RayError as error:
                text = f"cannot run a task ({str(error).strip().splitlines()[0][:200]})"
                said = [{"kind": "node", "where": f"node {calls[call]}", "message": text}]
            for fault in said:
                by_fault.setdefault(json.dumps(fault), (fault, []))[1].append(calls[call])
    for fault, addresses in by_fault.values():
        some = len(addresses) < len(calls) and fault["kind"] != "node"
        yield fault | ({"seen_from": sorted(set(addresses))[:3]} if some else {})


@contextlib.contextmanager
def _shared_file(spec: str, mark: str) -> Iterator[list[Found]]:
    """A file in a root that is a folder, for the other nodes to find; nothing of it is left behind."""
    from service.spec.job import JobSpec
    from service.storage import Storage

    root = Storage(JobSpec.model_validate_json(spec).root)
    if not root.is_local:
        yield []
        return
    folder = root.local()
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _mark(folder, mark).touch()
    except OSError as error:
        yield [_not_writable(root.path(), error)]
        return
    try:
        yield []
    finally:
        with contextlib.suppress(OSError):
            _mark(folder, mark).unlink()
            for place in made:
                place.rmdir()


def _mark(folder: Path, mark: str) -> Path:
    from service.storage import PRIVATE_PREFIX

    return folder / f"{PRIVATE_PREFIX}{mark}"


def _not_writable(root: str, error: OSError) -> Found:
    text = f"cannot be written on the cluster ({error.strerror or error}); give another outdir or storage.uri"
    return {"kind": "storage", "where": root, "message": text}


def look_from_node(spec: str, mark: str, reads: bool, brought: list[str]) -> list[Found]:
    """What keeps this node from its part in a job.

    Args:
        spec: the job, as JSON.
        mark: of the file that the driver has put into the root.
        reads: whether it must see what the job reads.
        brought: settings whose files are not there yet.
    """
    from service.errors import InputError
    from service.spec.job import JobSpec
    from service.storage import Storage

    job = JobSpec.model_validate_json(spec)
    found: list[Found] = []
    try:
        root = Storage(job.root)
        if root.is_local:
            if not _mark(root.local(), mark).exists():
                text = (
                    "is a folder that the cluster's nodes do not share; give one that they do, or s3://, as storage.uri"
                )
                found.append({"kind": "storage", "where": root.path(), "message": text})
        else:
            root.require_access(write=True)
    except InputError as error:
        found.append({"kind": "storage", "where": job.root, "message": str(error)})
    if reads:
        found += _unseen(job, brought)
    return found


def _unseen(job: Any, brought: list[str]) -> Iterator[Found]:
    """What the spec's own checks say on this node of the files that it names."""
    from service.errors import InputError, StorageError
    from service.spec import checks
    from service.spec.check_files import READ
    from service.spec.paths import is_uri
    from service.storage import Storage

    for finding in checks.findings(job, check_files=True):
        if finding.fatal and finding.settings[0] not in brought:
            fault = finding.fault(finding.settings[0])
            yield {"kind": "path"} | fault.as_dict()
    for setting in READ:
        section, name = setting.split(".")
        value = getattr(getattr(job, section), name)
        if not value or not is_uri(value) or setting in brought:
            continue
        parent, _, last = value.rstrip("/").rpartition("/")
        try:
            seen = Storage(parent, patience_s=15).exists(last)
        except (InputError, StorageError) as error:
            yield {"kind": "path", "where": setting, "value": value, "message": str(error)}
            continue
        if not seen:
            yield {"kind": "path", "where": setting, "value": value, "message": "is not there"}


def signal_job(job: str, name: str, node: str | None) -> dict[str, Any]:
    """Send a signal to the program of a job, on whichever node it runs.

    Args:
        job: its submission id.
        name: `TERM`, or `KILL`, whose end is waited for.
        node: id of the node; None: this one.

    Returns:
        {"signalled": process ids}.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    with _joined():
        there = node or ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(there, soft=False)
        send: Callable[..., Any] = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(_signal_here).remote
        return {"signalled": ray.get(send(job, name), timeout=_NODE_S)}


def _signal_here(job: str, name: str) -> list[int]:
    """The processes that Ray has started as the program of a job, and what these have started, get a signal."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ValueError, TypeError):
            config = json.loads(process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", "null"))
            if config and config.get("metadata", {}).get("job_submission_id") == job:
                found.append(process)
    # A shell around the program would end, and Ray with it all that is still writing its checkpoint.
    programs = [process for process in found if process.name() not in _SHELLS] or found
    for process in found if name == "KILL" else programs:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.Signals[f"SIG{name}"])
    if name == "KILL":
        psutil.wait_procs(found, timeout=10)
    return [process.pid for process in found]


if __name__ == "__main__":
    sys.exit(main())
