"""Running functions in other processes of the cluster."""

from __future__ import annotations

import functools
import math
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import ray

from jobs.cluster.errors import as_user_error
from jobs.cluster.resources import Resources, fitting, infeasible, missing_resources
from jobs.failures import explain
from service.errors import WhisperJobsError, WorkerLostError

_TRIES = 4
_POLL_S = 0.2


def run_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    cpus: float = 1,
    gpus: float = 0,
    wait_s: float = math.inf,
    check: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Run a function as one Ray task per tuple of arguments; those whose process dies are tried again.

    Args:
        function: runs in another process.
        calls: the arguments of each call.
        cpus: CPUs of each task.
        gpus: GPUs of each task.
        wait_s: how long to wait for a node where there is none that could run one.
        check: called again and again while they run; what it raises ends the wait.

    Raises:
        WhisperJobsError: as one of them raised it.
        InfeasibleError: no node could run one.
        WorkerLostError: the process of one died, each time that it was tried.
    """
    task = _task(function, cpus=cpus, gpus=gpus)
    tasks = [task.remote(*arguments) for arguments in calls]
    results: list[Any] = []
    lost, needed, homeless_since = 0, Resources(1, cpus, gpus), math.inf
    while len(results) < len(calls):
        index = len(results)
        while not ray.wait([tasks[index]], timeout=_POLL_S)[0]:
            check()
            homeless_since = math.inf if fitting(needed) else min(homeless_since, time.monotonic())
            if time.monotonic() - homeless_since > wait_s:
                raise infeasible(needed, missing_resources(needed), "the cluster")
        try:
            results.append(ray.get(tasks[index]))
        except ray.exceptions.RayError as error:
            failed = as_user_error(error)
            lost += 1
            if not isinstance(failed, WorkerLostError) or lost == _TRIES:
                raise failed from error
            tasks[index] = task.remote(*calls[index])
    return results


def _task(function: Callable[..., Any], *, cpus: float, gpus: float) -> Any:
    """A function as a Ray task whose errors come back whole: what the libraries raise may not survive pickling."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except WhisperJobsError:
            raise
        except Exception as error:  # noqa: BLE001  # the task's outermost frame
            failed = explain(error)
            failed.add_note(traceback.format_exc())  # shown with --debug
            raise failed from None

    # Ray's own retries would also repeat, for ever, a task that runs out of memory.
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(call)
