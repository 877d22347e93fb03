"""Every error that a user may see, and the exit code that goes with it.

    WhisperJobsError            exit code
    ├── InputError                  2   bad input; nothing was started, nothing was changed
    │   ├── SpecError                   faults of a job spec or a flag
    │   ├── ManifestError               faults of a CSV or of the audio that it names
    │   └── ExistsError                 another writer was first
    ├── JobFailedError              3   the job ran and failed
    │   ├── StorageError               11   results cannot be written: a full disk, a forbidden folder, no store
    │   ├── OutOfMemoryError           12   a worker ran out of memory
    │   ├── DivergedError              13   a loss or gradient is not a finite number
    │   ├── HungError                  14   a worker gave no sign of life
    │   ├── InputLostError             15   audio or a model that the job had checked is gone
    │   └── WorkerLostError            16   a worker process died, more often than resources.max_failures
    ├── StoppedError                4   the job was asked to stop (SIGTERM, SIGHUP), and did
    │   └── InterruptedByUserError    130   the same, by Ctrl-C
    ├── LeftError                 130   the user stopped following a job on a cluster (Ctrl-C)
    ├── NotFoundError               5   no such run, artifact, model or job
    ├── NotFinishedError            6   the run has no manifest.json yet; the job has not ended
    ├── UnauthorisedError           7   the cluster refuses the token, or wants one
    ├── UnreachableError            8   no Ray cluster answers at the address
    ├── InfeasibleError             9   the machine or cluster cannot hold the job
    ├── VerificationError          10   a result did not pass its proof: hashes, merge bound, coverage
    └── RefusedError               17   an export did not pass its proof; everything else was delivered

0 is success, 1 a fault of whisper-jobs itself. `LeftError` is no outcome of a
job: its user has stopped watching it, and it goes on.
All of them survive pickling, since they cross process borders in Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

EXIT_DONE = 0
EXIT_INTERNAL = 1
EXIT_INTERRUPTED = 130

_MISSING: Any = "\0missing"  # compared by value: an identity does not survive pickling


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: where it stands, what stands there, and what would be right."""

    where: str
    message: str
    value: Any = _MISSING

    @property
    def has_value(self) -> bool:
        """Whether there is a value to show (a missing setting has none)."""
        return not (isinstance(self.value, str) and self.value == _MISSING)

    def __str__(self) -> str:
        shown = f" {_short(self.value)}" if self.has_value else ""
        return f"{self.where}:{shown} {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """The fault as JSON: where, message and, where there is one, value."""
        plain: dict[str, Any] = {"where": self.where, "message": self.message}
        if self.has_value:
            plain["value"] = self.value
        return plain


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if len(text) <= limit:
        return text
    # Of a path, the end says which file it is.
    return "..." + text[3 - limit :] if "/" in text[-limit // 2 :] else text[: limit - 3] + "..."


class WhisperJobsError(Exception):
    """Base of all errors with a message for the user; `exit_code` is what the command ends with."""

    exit_code = EXIT_INTERNAL


class InputError(WhisperJobsError):
    """Bad input: one or more faults, all found in one go; nothing was started."""

    exit_code = 2

    def __init__(self, faults: Iterable[Fault] | str) -> None:
        self.faults: list[Fault] = [] if isinstance(faults, str) else list(faults)
        self._text = faults if isinstance(faults, str) else "\n".join(map(str, self.faults))
        super().__init__(self._text)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.faults or self._text,)


class SpecError(InputError):
    """A job spec or a flag is wrong."""


class ManifestError(InputError):
    """A CSV manifest is wrong, or the audio that it names."""


class ExistsError(InputError):
    """What was to be written only once is there already: another writer was first."""


class JobFailedError(WhisperJobsError):
    """The job ran and failed."""

    exit_code = 3


class StorageError(JobFailedError):
    """Results cannot be written."""

    exit_code = 11


class OutOfMemoryError(JobFailedError):
    """A worker ran out of memory."""

    exit_code = 12


class DivergedError(JobFailedError):
    """A loss or a gradient is not a finite number."""

    exit_code = 13


class HungError(JobFailedError):
    """A worker gave no sign of life for too long."""

    exit_code = 14


class InputLostError(JobFailedError):
    """Audio or a model that the job had checked is gone."""

    exit_code = 15


class WorkerLostError(JobFailedError):
    """A process of the job died: the one failure after which the job goes on by itself."""

    exit_code = 16


class StoppedError(WhisperJobsError):
    """The job was asked to stop, and did."""

    exit_code = 4


class InterruptedByUserError(StoppedError):
    """The user stopped the job with Ctrl-C."""

    exit_code = EXIT_INTERRUPTED


class LeftError(WhisperJobsError):
    """The user stopped following a job, which goes on."""

    exit_code = EXIT_INTERRUPTED


class NotFoundError(WhisperJobsError):
    """No such run, artifact, model or job."""

    exit_code = 5


class NotFinishedError(WhisperJobsError):
    """The run is not complete: it has no manifest.json, or its job is at work."""

    exit_code = 6


class UnauthorisedError(WhisperJobsError):
    """The cluster refuses the token, or wants one."""

    exit_code = 7


class UnreachableError(WhisperJobsError):
    """No Ray cluster answers."""

    exit_code = 8


class RefusedError(WhisperJobsError):
    """An export did not pass its proof; everything else was delivered."""

    exit_code = 17


class InfeasibleError(WhisperJobsError):
    """The machine or cluster cannot hold the job."""

    exit_code = 9


class VerificationError(WhisperJobsError):
    """A result did not pass its proof."""

    exit_code = 10


def failure_text(message: str, faults: list[Fault], exit_code: int, *, as_json: bool) -> str:
    """An error as its reader sees it on stderr: a line for one fault, a list for several, or one JSON object."""
    if as_json:
        content: dict[str, Any] = {"error": message, "exit_code": exit_code}
        content["faults"] = [fault.as_dict() for fault in faults]
        return json.dumps(content, default=lambda value: repr(value)[:200])
    if len(faults) > 1:
        return "\n".join([f"error: {len(faults)} faults", *(f"  {fault}" for fault in faults)])
    return f"error: {message}"
