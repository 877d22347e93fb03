"""What the cluster itself says of a job before it is submitted: versions, resources, storage, and the job's files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from service.client.api import Api
from service.client.package import SPEC_FILE, Package, bring
from service.client.record import JobRecord, lines_of
from service.errors import Fault, InfeasibleError, InputError, NotFoundError, UnreachableError
from service.requirements import DISTRIBUTION, requirement
from service.spec.paths import is_uri

ERRANDS = "jobs.errands"
"""The program that looks around on the cluster."""

ERRAND_PREFIX = "wj-errand-"
"""How the submission ids of errands begin: they are no jobs, and leave nothing behind."""

_ANSWER = "whisper-jobs-says "
_START_S = 300.0
_POLL_S = 0.3
_LEFT_S = 60.0

BAD_INPUT = ("path", "storage")
"""Kinds of faults that are the user's to mend in the spec; all others are the cluster's."""


@dataclass(frozen=True)
class Looked:
    """What the cluster said.

    Attributes:
        python: its Python's version.
        packages: versions of Ray, torch, transformers and PEFT there.
        nodes: its living nodes: address, cpus, gpus, gpu (its kind).
        can_grow: whether an autoscaler may add nodes.
        faults: what keeps the job from running: {"kind", "where", "message", ["value"]}.
        notes: what does not, but is worth knowing; in the same form.
    """

    python: str
    packages: dict[str, str]
    nodes: list[dict[str, Any]]
    can_grow: bool
    faults: list[dict[str, Any]]
    notes: list[dict[str, Any]]

    @property
    def gpu(self) -> str | None:
        """The kind of GPU that most of its GPUs are."""
        counts: dict[str, float] = {}
        for node in self.nodes:
            if node["gpu"]:
                counts[node["gpu"]] = counts.get(node["gpu"], 0) + node["gpus"]
        return max(counts, key=lambda name: counts[name]) if counts else None

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return dict(vars(self))


def require_fitting_ray(version: str) -> None:
    """Refuse a cluster whose Ray is none that this version of whisper-jobs works with.

    Raises:
        InfeasibleError: it is not.
    """
    wanted = requirement("ray")
    if wanted is None:
        return
    try:
        fits = wanted.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    if not fits:
        ours = importlib.metadata.version(DISTRIBUTION)
        raise InfeasibleError(
            f"the cluster has Ray {version}, and whisper-jobs {ours} works with Ray {wanted.specifier}: start the "
            "cluster with such a Ray, or install another whisper-jobs here"
        )


def look(api: Api, package: Package, *, with_spec: bool, brought: Sequence[str] = ()) -> Looked:
    """Have the cluster look around.

    Args:
        api: the cluster.
        package: code, and the spec to look for.
        with_spec: whether it holds one.
        brought: settings whose files are not there yet, but will be.
    """
    words = f"check --config {SPEC_FILE}" if with_spec else "check"
    if brought:
        words += f" --brought {' '.join(brought)}"
    answer = run_errand(api, package, words)
    return Looked(**answer)


def run_errand(api: Api, package: Package, words: str) -> dict[str, Any]:
    """Run a small program of ours on the cluster, and take it off the cluster's list again.

    Returns:
        its answer.

    Raises:
        UnreachableError: the cluster does not start it, or it ends without an answer.
    """
    errand = f"{ERRAND_PREFIX}{secrets.token_hex(6)}"
    _sweep(api)
    bring(api, package)
    try:
        api.submit(errand, f"python -m {ERRANDS} {words}", {"working_dir": package.uri}, {})
        record = _end_of(api, errand)
        said = api.logs(errand)
    finally:
        _clear(api, errand)
    answers = [line for line in lines_of(said) if line.startswith(_ANSWER)]
    if not answers:
        raise UnreachableError(f"{api.cluster.url}: a check that was run on the cluster failed: {_why(record, said)}")
    return dict(json.loads(answers[-1].removeprefix(_ANSWER)))


def _end_of(api: Api, errand: str) -> JobRecord:
    deadline = time.monotonic() + _START_S
    while not (record := api.job(errand)).status.is_terminal:
        if time.monotonic() > deadline:
            text = f"takes jobs, but does not run them: a check has been {record.outcome} for {_START_S:.0f} s"
            raise UnreachableError(f"{api.cluster.url}: {text}; look at the head node")
        time.sleep(_POLL_S)
    return record


def _clear(api: Api, errand: str) -> None:
    with contextlib.suppress(UnreachableError, NotFoundError):
        if not api.job(errand).status.is_terminal:
            api.stop(errand)
    api.forget_later(errand)


def _sweep(api: Api) -> None:
    """Take errands off the list whose clients have gone before they could."""
    for record in api.jobs():
        ended_s = time.time() - (record.ended_ms or 0) / 1000
        if record.submission_id.startswith(ERRAND_PREFIX) and record.status.is_terminal and ended_s > _LEFT_S:
            with contextlib.suppress(UnreachableError, NotFoundError):
                api.forget(record.submission_id)


def _why(record: JobRecord, said: str) -> str:
    if "No module named" in said:
        missing = said.rsplit("No module named", 1)[1].strip().splitlines()[0]
        return f'its Python has no {missing}; pip install "{DISTRIBUTION}[jobs]" in the image of its nodes'
    if "not found" in said and "python" in said:
        return "there is no `python` on its PATH"
    return record.reason or record.outcome


def require_fit(looked: Looked, *, uploads: bool) -> None:
    """Refuse what the cluster cannot run: all faults at once.

    Args:
        looked: what it said.
        uploads: whether what the spec names was brought to its storage.

    Raises:
        InputError: something that the spec names is not there, or cannot be written.
        InfeasibleError: the cluster lacks resources or packages.
    """
    faults = [as_fault(found, uploads=uploads) for found in looked.faults]
    if any(found["kind"] in BAD_INPUT for found in looked.faults):
        raise InputError(faults)
    if faults:
        lines = [str(fault) for fault in faults]
        heading = f"{len(lines)} faults of the cluster"
        raise InfeasibleError(lines[0] if len(lines) == 1 else "\n  ".join([heading, *lines]))


def as_fault(found: dict[str, Any], *, uploads: bool) -> Fault:
    """One of `Looked.faults`, as an error shows it."""
    message = found["message"]
    seen = f" (seen from {', '.join(found['seen_from'])})" if "seen_from" in found else ""
    if found["kind"] == "path" and not uploads and not is_uri(str(found.get("value", "://"))):
        what = message.split("; ")[0]
        way_out = "put it where all nodes see it, or have what is here brought there with --upload"
        message = f"{what}, on the cluster{seen}; {way_out}"
    else:
        message += seen
    value = {"value": found["value"]} if "value" in found else {}
    return Fault(found["where"], message, **value)
