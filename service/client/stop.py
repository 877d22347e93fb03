"""Stopping a job: it is asked, has time for a checkpoint, and is ended if it does not use it."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.client.api import Api
from service.client.check import run_errand
from service.client.follow import Watch
from service.client.package import make_package
from service.client.record import MARK, JobRecord
from service.errors import JobFailedError, UnreachableError

LONGEST_GRACE_S = 600
"""How long Ray itself waits before it ends a program of ours that was asked to stop (RAY_JOB_STOP_WAIT_TIME_S)."""

DEFAULT_GRACE_S = 300
_KILLED_S = 30.0
_AWAY_S = 120.0
"""How long a dashboard may be away while a job is stopped."""

_POLL_S = 0.5

Say = Callable[[str], None]


def stop(api: Api, record: JobRecord, grace_s: float, tell: Say) -> JobRecord:
    """Stop a job.

    Args:
        api: the cluster.
        record: the job; one that has ended stays as it is.
        grace_s: seconds for a checkpoint, after which its program is killed.
        tell: takes a line for whoever watches.

    Returns:
        the job as it ended.

    Raises:
        NotFoundError: there is no such job.
        JobFailedError: it cannot even be killed.
    """
    if record.status.is_terminal:
        return record
    watch = Watch(api, record.submission_id, tell, _AWAY_S)
    if MARK in record.metadata:
        api.stop(record.submission_id)
        last = _wait(watch, grace_s)
    else:
        # Of a job that was submitted without our word on it, Ray would kill the program 3 s after it was asked.
        _signal(api, record, "TERM")
        last = _wait(watch, grace_s)
    if not last.status.is_terminal:
        tell(f"no end after {grace_s:g} s; killing its program (an earlier checkpoint is kept)")
        _signal(api, last, "KILL")
        last = _wait(watch, _KILLED_S)
    if not last.status.is_terminal:
        text = "was killed, and the cluster still calls it at work; look at the head node"
        raise JobFailedError(f"{record.submission_id}: {text}")
    return last


def _signal(api: Api, record: JobRecord, name: str) -> None:
    node = f" --node {record.node_id}" if record.node_id else ""
    try:
        run_errand(api, make_package(None), f"signal {record.submission_id} {name}{node}")
    except UnreachableError as error:
        raise JobFailedError(f"{record.submission_id}: its program cannot be sent SIG{name}: {error}") from error


def _wait(watch: Watch, seconds: float) -> JobRecord:
    """The job once it has ended, or as it is after so long."""
    deadline = time.monotonic() + seconds
    while True:
        record = watch.look()
        if record.status.is_terminal or time.monotonic() >= deadline:
            return record
        time.sleep(_POLL_S)
