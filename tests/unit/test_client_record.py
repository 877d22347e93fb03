"""What a job's state means: exit codes, reasons, whose it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jobs import errands
from service.cli import watch
from service.client import check
from service.client.record import JobRecord, Status, lines_of
from service.client.stop import LONGEST_GRACE_S
from service.client.submit import metadata, next_id, spec_of
from service.spec.job import JobSpec


def record(status: str, **more: Any) -> JobRecord:
    return JobRecord.from_api({"submission_id": "demo-1a2b3c4d", "status": status, "entrypoint": "", **more})


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        ("SUCCEEDED", 0, 0), ("STOPPED", None, 4), ("PENDING", None, 6), ("RUNNING", None, 6), ("FAILED", 2, 2),
        ("FAILED", 9, 9), ("FAILED", 17, 17), ("FAILED", 1, 1), ("FAILED", None, 3), ("FAILED", -9, 3),
        ("FAILED", 137, 3), ("FAILED", 127, 3), ("FAILED", 18, 3),
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


def test_the_reason_of_several_faults_is_all_of_them() -> None:
    said = "last available logs:\nerror: 2 faults\n  a.csv, line 2: no such file\n  b.csv: is empty; mend it\nmore\n"
    assert (
        record("FAILED", driver_exit_code=2, message=said).reason
        == "a.csv, line 2: no such file; b.csv: is empty; mend it"
    )


def test_lines_are_parted_by_line_feeds_alone() -> None:
    assert lines_of("one\u2028and\x0cmore\ntwo\n") == ["one\u2028and\x0cmore", "two"]
    assert lines_of("") == []
    assert lines_of("\n\n") == ["", ""]


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([], "demo-{}"),
        (["demo-{}"], "demo-{}-2"),
        (["demo-{}-2"], "demo-{}-3"),
        (["demo-{}", "demo-{}-2", "demo-{}-10"], "demo-{}-11"),
        (["demo-{}-x", "demo-00000000-7", "other"], "demo-{}"),
    ],
)
def test_the_next_try_has_the_next_number_whatever_was_deleted(there: list[str], expected: str) -> None:
    spec = JobSpec(name="demo")
    short = spec.sha256[:8]
    jobs = [JobRecord.from_api({"submission_id": name.format(short), "status": "FAILED"}) for name in there]
    assert next_id(spec, jobs) == expected.format(short)


def test_a_spec_of_another_version_is_not_known() -> None:
    spec = JobSpec(name="demo")
    known = record("FAILED", metadata=metadata(spec, "0.1.0"))
    assert spec_of(known) == spec
    other = json.loads(known.metadata["spec"]) | {"of_another_version": 1}
    assert spec_of(record("FAILED", metadata={"spec": json.dumps(other)})) is None
    assert spec_of(record("FAILED")) is None


def test_the_client_looks_for_the_answer_that_an_errand_gives() -> None:
    assert check._ANSWER == errands.ANSWER
    assert watch.stop.params[1].type.max == LONGEST_GRACE_S
