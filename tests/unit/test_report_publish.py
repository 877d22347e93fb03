"""The end of a job leaves the report, listed and hashed; no job fails because there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from reports import DATA, TUNED, metrics_of, rates, write_run

from jobs.publish import publish
from service import artifacts
from service.artifacts import BaseModelRecord, read_manifest, verify
from service.spec.job import JobSpec
from service.storage import Storage

BASE_MODEL = BaseModelRecord(name="openai/whisper-tiny", revision="c0ffee", weights_sha256={})


def end_of_job(root: Storage, warned: list[str], **changes: Any) -> None:
    """Publish what lies at a root, as its job does; what is warned of goes to events.jsonl at once."""
    spec = JobSpec.model_validate(root.read_json(artifacts.SPEC))

    def warn(text: str) -> None:
        warned.append(text)
        root.write_bytes(artifacts.EVENTS, root.read_bytes(artifacts.EVENTS) + b'{"event": "notice"}\n')

    publish(spec, root, metrics_of() | changes, DATA, BASE_MODEL, warn)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A run whose stages are all done."""
    local = write_run(tmp_path / "run", complete=False)
    if request.param == "local":
        return local
    remote = Storage(f"memory://{tmp_path}/run")
    for name, _ in local.files():
        remote.write_bytes(name, local.read_bytes(name))
    return remote


def test_the_report_is_listed_and_knows_what_the_manifest_knows(root: Storage) -> None:
    warned: list[str] = []
    end_of_job(root, warned)
    assert warned == []
    assert artifacts.REPORT in {record.path for record in read_manifest(root).files}
    assert verify(root).problems == []
    page = root.read_bytes(artifacts.REPORT).decode()
    assert "openai/whisper-tiny at c0ffee" in page
    assert "<h3>Origin</h3>" in page
    assert "242 clips" in page


def test_without_a_report_the_job_is_published_all_the_same_and_says_why(root: Storage) -> None:
    root.write_bytes(artifacts.REJECTS, b"split,path,kind,reason\n\xff\xfe\n")
    root.write_text(artifacts.REPORT, "of an attempt before")
    warned: list[str] = []
    end_of_job(root, warned)
    (text,) = warned
    assert text.startswith("there is no report.html: InputError: ")
    assert "rejects.csv: cannot be read" in text
    assert not root.exists(artifacts.REPORT)
    assert verify(root).problems == [], "what was warned of is in events.jsonl before its hash is taken"


def test_figures_of_an_unknown_form_are_no_reason_to_fail(root: Storage) -> None:
    warned: list[str] = []
    end_of_job(root, warned, seconds={"train": "long", "total": 1.0})
    assert len(warned) == 1
    assert read_manifest(root).promoted is True


def test_a_job_that_only_scores_has_a_report_too(tmp_path: Path) -> None:
    root = write_run(tmp_path, base=None, tuned=None, events=[], complete=False, spec={"kind": "evaluate"})
    spec = JobSpec.model_validate(root.read_json(artifacts.SPEC))
    publish(spec, root, {"job_id": "scored", "model": rates(TUNED)}, {"val": DATA["val"]}, BASE_MODEL)
    assert "Scored" in root.read_bytes(artifacts.REPORT).decode()
