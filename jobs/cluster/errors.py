"""What Ray raises, as the user should see it."""

from __future__ import annotations

import re

import ray

from jobs.failures import GO_ON, explain, first_line
from service.errors import OutOfMemoryError, WhisperJobsError, WorkerLostError

DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
"""What Ray raises where a process or its node has gone."""


def as_user_error(error: BaseException) -> WhisperJobsError:
    """What Ray raised, as the user should see it."""
    error = root_cause(error)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return OutOfMemoryError(
            f"Ray ended a worker because its node ran out of memory ({first_line(error)}); lower "
            f"training.per_dev_batch (or set `per_dev_batch: auto`, with training.grad_accum the clips of a step) or "
            f"evaluation.batch_size, or give the workers more memory. {GO_ON}"
        )
    if isinstance(error, DEATHS):
        return WorkerLostError(f"a process of the job died ({_death(error)}). {GO_ON}")
    return explain(error)


def root_cause(error: BaseException) -> BaseException:
    """What lies in the wrappings of Ray and Ray Train."""
    for name in ("cause", "_base_exc", "health_check_failure", "controller_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return root_cause(inner)
    return error


def _death(error: BaseException) -> str:
    text = " ".join(str(error).split())
    for pattern in (r"exit detail: ([^.]+)", r"due to ([^.]+)"):
        if found := re.search(pattern, text):
            return found.group(1)[:200]
    return first_line(error)
