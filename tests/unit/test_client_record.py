"""What a job's state means: exit codes, reasons, whose it is."""

from __future__ import annotations

from typing import Any

import pytest

from service.client.record import JobRecord, Status


def record(status: str, **more: Any) -> JobRecord:
    return JobRecord.from_api({"submission_id": "demo-1a2b3c4d", "status": status, "entrypoint": "", **more})


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        ("SUCCEEDED", 0, 0), ("STOPPED", None, 4), ("PENDING", None, 6), ("RUNNING", None, 6), ("FAILED", 2, 2),
        ("FAILED", 9, 9), ("FAILED", 17, 17), ("FAILED", 1, 1), ("FAILED", None, 3), ("FAILED", -9, 3),
        ("FAILED", 137, 3),
    ],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_program_where_it_had_one(status: str, code: int | None, exit_code: int) -> None:
    assert record(status, driver_exit_code=code).exit_code == exit_code


def test_only_three_states_are_the_last() -> None:
    assert {status for status in Status if status.is_terminal} == {Status.SUCCEEDED, Status.FAILED, Status.STOPPED}


def test_the_reason_is_what_the_job_itself_said_last() -> None:
    said = "failed with exit code 12, last available logs:\nerror: first\nmore\nerror: ran out of memory; lower it\n"
    assert record("FAILED", driver_exit_code=12, message=said).reason == "ran out of memory; lower it"
    assert (
        record("FAILED", message="Job supervisor actor died: node lost\nmore").reason
        == "Job supervisor actor died: node lost"
    )
    assert record("FAILED").reason == "no reason is known"
    assert record("SUCCEEDED", message="error: none").reason == ""


def test_a_program_that_says_it_was_stopped_was_stopped() -> None:
    assert record("FAILED", driver_exit_code=4).outcome == "stopped"
    assert record("FAILED", driver_exit_code=3).outcome == "failed"


@pytest.mark.parametrize(
    ("entry", "ours"),
    [
        ({"metadata": {"whisper-jobs": "0.1.0"}}, True),
        ({"entrypoint": "python -m jobs.main --config a.json"}, True),
        ({"entrypoint": "python train.py"}, False),
        ({"entrypoint": "python -m jobs.errands check"}, False),
    ],
)
def test_jobs_of_ours_are_known_however_they_were_submitted(entry: dict[str, Any], ours: bool) -> None:
    assert record("RUNNING", **entry).is_ours is ours
    assert record("RUNNING", **entry).job_id == "demo-1a2b3c4d"
