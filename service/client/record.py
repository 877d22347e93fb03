"""A job as the cluster knows it, and the exit code that its outcome has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.errors import (
    EXIT_DONE,
    EXIT_INTERNAL,
    JobFailedError,
    NotFinishedError,
    StoppedError,
)

MARK = "whisper-jobs"
"""In the metadata of the jobs that this client has submitted: its version."""

_PROGRAM = "jobs.main"
_ERROR = re.compile(r"^error: (.+(?:\n  \S.*)*)$", re.MULTILINE)
"""The error that a job's program ends with: of several faults each has a line of its own, two blanks in."""

_KNOWN_CODES = range(EXIT_INTERNAL, 18)
"""Exit codes of our program; what a shell or a signal has made of it says nothing."""


class Status(StrEnum):
    """Ray's words for how far a job is."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended, one way or another."""
        return self in (Status.STOPPED, Status.SUCCEEDED, Status.FAILED)


@dataclass(frozen=True)
class JobRecord:
    """One submission.

    Attributes:
        submission_id: its id for all tools of Ray.
        metadata: what its client wrote down with it.
        code: exit code of the program, where it has ended by itself.
        message: Ray's words on its state.
        started_ms: Unix time.
        node_id: of the node that the program runs on.
    """

    submission_id: str
    status: Status
    entrypoint: str
    metadata: Mapping[str, str]
    code: int | None
    message: str
    started_ms: int
    ended_ms: int | None
    node_id: str | None

    @classmethod
    def from_api(cls, entry: Mapping[str, Any]) -> JobRecord:
        """From an entry of the Jobs API."""
        return cls(
            submission_id=str(entry["submission_id"]),
            status=Status(str(entry["status"])),
            entrypoint=str(entry.get("entrypoint") or ""),
            metadata=entry.get("metadata") or {},
            code=None if entry.get("driver_exit_code") is None else int(entry["driver_exit_code"]),
            message=str(entry.get("message") or ""),
            started_ms=int(entry.get("start_time") or 0),
            ended_ms=entry.get("end_time"),
            node_id=entry.get("driver_node_id"),
        )

    @property
    def is_ours(self) -> bool:
        """Whether it is a job of whisper-jobs, however it was submitted."""
        return MARK in self.metadata or f"-m {_PROGRAM}" in self.entrypoint

    @property
    def job_id(self) -> str:
        """The job that this is a try at: name and hash of its spec."""
        return self.metadata.get("job_id", self.submission_id)

    @property
    def root(self) -> str | None:
        """Where its results go; None: its client did not say."""
        return self.metadata.get("root")

    @property
    def exit_code(self) -> int:
        """What a command ends with that has waited for it."""
        if self.status is Status.SUCCEEDED:
            return EXIT_DONE
        if self.status is Status.STOPPED:
            return StoppedError.exit_code
        if not self.status.is_terminal:
            return NotFinishedError.exit_code
        return self.code if self.code is not None and self.code in _KNOWN_CODES else JobFailedError.exit_code

    @property
    def outcome(self) -> str:
        """Its state in a word."""
        if self.status is Status.FAILED and self.exit_code == StoppedError.exit_code:
            return "stopped"
        return self.status.value.lower()

    @property
    def reason(self) -> str:
        """Why it failed, as the job itself has said or, if it could not, as Ray has; empty where it did not fail."""
        if self.status is not Status.FAILED:
            return ""
        if said := _ERROR.findall(self.message):
            heading, *faults = str(said[-1]).split("\n")
            return "; ".join(fault.strip() for fault in faults) or heading
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        return (lines[0] if self.code is None else lines[-1])[:300] if lines else "no reason is known"

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "submission_id": self.submission_id,
            "job_id": self.job_id,
            "status": self.outcome,
            "exit_code": self.exit_code,
            "reason": self.reason or None,
            "name": self.metadata.get("name"),
            "kind": self.metadata.get("kind"),
            "root": self.root,
            "started_ms": self.started_ms,
            "ended_ms": self.ended_ms,
        }


def lines_of(text: str) -> list[str]:
    """A log's lines: parted by line feeds alone, since a transcript may hold other signs that part lines."""
    return text.removesuffix("\n").split("\n") if text else []
