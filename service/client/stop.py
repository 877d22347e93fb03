"""Stopping a job: it is asked, has time for a checkpoint, and is ended if it does not use it."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.client.api import Api
from service.client.check import run_errand
from service.client.package import make_package
from service.client.record import JobRecord
from service.errors import JobFailedError

LONGEST_GRACE_S = 600
"""How long Ray itself waits before it ends a program of ours that was asked to stop (RAY_JOB_STOP_WAIT_TIME_S)."""

DEFAULT_GRACE_S = 300.0
_KILLED_S = 30.0
_POLL_S = 0.5


def stop(api: Api, record: JobRecord, grace_s: float, tell: Callable[[str], None]) -> JobRecord:
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
    job_id = record.submission_id
    if record.status.is_terminal:
        return record
    api.stop(job_id)
    ended = _wait(api, job_id, grace_s)
    if ended is None:
        tell(f"no end after {grace_s:g} s; killing its program (an earlier checkpoint is kept)")
        node = f" --node {record.node_id}" if record.node_id else ""
        run_errand(api, make_package(None), f"kill {job_id}{node}")
        ended = _wait(api, job_id, _KILLED_S)
    if ended is None:
        raise JobFailedError(f"{job_id}: was killed, and the cluster still calls it at work; look at the head node")
    return ended


def _wait(api: Api, job_id: str, seconds: float) -> JobRecord | None:
    deadline = time.monotonic() + seconds
    while not (record := api.job(job_id)).status.is_terminal:
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_S)
    return record
