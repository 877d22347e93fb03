"""Submitting a job so that it runs once: the same spec attaches, another one under its name is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from service.client.api import Api, TakenError
from service.client.package import SPEC_FILE, Package, bring
from service.client.record import MARK, JobRecord, Status
from service.client.stop import LONGEST_GRACE_S
from service.errors import Fault, InputError, UnreachableError
from service.spec.flags import CONFIG_FLAG, NO_WARNINGS_FLAG
from service.spec.job import JobSpec, differing

PROGRAM = "python -m jobs.main"

_DOUBTFUL = 3
"""How often another client may be faster before something must be wrong."""


@dataclass(frozen=True)
class Submission:
    """What came of submitting a job.

    Attributes:
        submission_id: of the job on the cluster.
        root: where its results are.
        ended: the job, where it is attached and has ended.
        attached: whether it was there already, of this very spec.
        again: whether an earlier try at the job has ended before its end; this one goes on from there.
    """

    submission_id: str
    root: str
    attached: bool
    again: bool
    ended: JobRecord | None = None


def find_attempts(jobs: Iterable[JobRecord], job_id: str) -> list[JobRecord]:
    """The submissions of one job, the newest first."""
    return [record for record in jobs if record.metadata.get("job_id") == job_id]


def submit(
    api: Api,
    spec: JobSpec,
    package: Package,
    *,
    version: str,
    overwrite: bool = False,
    reuse_name: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Submission:
    """Submit a job, unless it is there.

    Args:
        api: the cluster.
        spec: resolved and checked.
        package: holds it and our code.
        version: of whisper-jobs.
        overwrite: run it anew, also where it has succeeded.
        reuse_name: take the name although another job with another spec has it.
        check: called before anything is submitted, not where there is something to attach to; raises what keeps it out.

    Raises:
        InputError: the name is another job's.
    """
    checked = False
    for _ in range(_DOUBTFUL):
        jobs = api.jobs()
        attempts = find_attempts(jobs, spec.job_id)
        if attempts and _stands(attempts[0], overwrite=overwrite):
            require_same_root(spec, attempts[0])
            ended = attempts[0] if attempts[0].status.is_terminal else None
            return Submission(attempts[0].submission_id, spec.root, attached=True, again=False, ended=ended)
        if not reuse_name:
            refuse_taken_name(spec, jobs)
        if not checked:
            check()
            checked = True
        submission_id = next_id(spec, jobs)
        bring(api, package)
        try:
            api.submit(submission_id, entrypoint(overwrite=overwrite), runtime_env(package), metadata(spec, version))
        except TakenError:
            continue  # by another client with the same spec, a moment ago: look again
        if not reuse_name:
            _give_way(api, spec, submission_id)
        again = bool(attempts) and attempts[0].root == spec.root and not overwrite
        return Submission(submission_id, spec.root, attached=False, again=again)
    raise UnreachableError(f"{api.cluster.url}: {spec.job_id} is submitted and ended by others all the time; try again")


def require_same_root(spec: JobSpec, record: JobRecord) -> None:
    """Refuse to attach to a job whose results are elsewhere: where they go makes no other job.

    Raises:
        InputError: they are.
    """
    if record.root != spec.root:
        setting = "training.outdir" if spec.training.outdir else "storage.uri"
        text = (
            f"would put the results into {spec.root}, but {record.submission_id}, {record.outcome}, is this very job, "
            f"and its results go to {record.root}; give that place, or --overwrite to run it anew once it has ended"
        )
        raise InputError([Fault(setting, text)])


def _stands(newest: JobRecord, *, overwrite: bool) -> bool:
    """Whether a submission is the answer to the same one again. One that has failed or was stopped is gone on with."""
    return not newest.status.is_terminal or (newest.status is Status.SUCCEEDED and not overwrite)


def next_id(spec: JobSpec, jobs: Iterable[JobRecord]) -> str:
    """The id of the next try: the job's own, then with a number. Of clients that count alike, one wins."""
    tries = [0]
    for record in jobs:
        name, _, number = record.submission_id.rpartition("-")
        if record.submission_id == spec.job_id:
            tries.append(1)
        elif name == spec.job_id and number.isdecimal():
            tries.append(int(number))
    return spec.job_id if max(tries) == 0 else f"{spec.job_id}-{max(tries) + 1}"


def entrypoint(*, overwrite: bool) -> str:
    """The command line that the cluster runs."""
    return f"{PROGRAM} {CONFIG_FLAG} {SPEC_FILE} {NO_WARNINGS_FLAG}{' --overwrite' if overwrite else ''}"


def runtime_env(package: Package) -> dict[str, Any]:
    """What the job's processes get: everyone who may list jobs can read it, so nothing secret is in it."""
    return {
        "working_dir": package.uri,
        # Read by Ray where it stops a job: between SIGTERM and SIGKILL lies a checkpoint.
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(LONGEST_GRACE_S)},
    }


def metadata(spec: JobSpec, version: str) -> dict[str, str]:
    """What the cluster keeps of a job, for whoever asks later."""
    return {
        MARK: version,
        "job_id": spec.job_id,
        "name": spec.name or "",
        "kind": spec.kind,
        "spec_sha256": spec.sha256,
        "root": spec.root,
        "spec": json.dumps(spec.model_dump(mode="json"), ensure_ascii=False),
    }


def spec_of(record: JobRecord) -> JobSpec | None:
    """The spec of a job; None: it was not submitted by this client, or by one that knows other settings."""
    try:
        return JobSpec.model_validate_json(record.metadata.get("spec", ""))
    except ValueError:
        return None


def refuse_taken_name(spec: JobSpec, jobs: Iterable[JobRecord]) -> None:
    """Refuse a name that another job has which is at work or has succeeded.

    Raises:
        InputError: the name and the settings in which the two differ.
    """
    for other in _namesakes(spec, jobs):
        before = spec_of(other)
        settings = differing(before, spec) if before else []
        how = f" (it differs in {', '.join(settings)})" if settings else ""
        way_out = "give another --name or, with --reuse-name, let two jobs have it; each has its own results"
        text = f"is the name of {other.submission_id}, {other.outcome}, with another spec{how}; {way_out}"
        raise InputError([Fault("name", text, spec.name)])


def _namesakes(spec: JobSpec, jobs: Iterable[JobRecord]) -> list[JobRecord]:
    """Jobs of another spec under this one's name; one that was made up from model and method is nobody's."""
    if not spec.name:
        return []
    return [
        record
        for record in jobs
        if record.metadata.get("name") == spec.name
        and record.metadata.get("spec_sha256") != spec.sha256
        and (not record.status.is_terminal or record.status is Status.SUCCEEDED)
    ]


def _give_way(api: Api, spec: JobSpec, submission_id: str) -> None:
    """Of two clients that took one name for different specs in the same moment, the one that came later gives way.

    Raises:
        InputError: that is this one; its job is taken back.
    """
    jobs = api.jobs()
    ours = next((record for record in jobs if record.submission_id == submission_id), None)
    if ours is None:  # the cluster has just lost all it knew
        return

    def order(record: JobRecord) -> tuple[int, str]:
        return record.started_ms, record.submission_id

    if earlier := [record for record in _namesakes(spec, jobs) if order(record) < order(ours)]:
        api.stop(submission_id)
        refuse_taken_name(spec, earlier)
