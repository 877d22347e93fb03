"""manifest.json knows every file of a run, and `verify` finds whatever was done to them since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service import artifacts
from service.artifacts import BaseModelRecord, FileRecord, RunManifest, file_records, read_manifest, verify
from service.errors import NotFinishedError, NotFoundError
from service.storage import Storage

FILES = {
    "spec.json": "{}",
    "metrics.json": '{"a": 1}',
    "adapter/adapter_model.safetensors": "tensors",
    "merged/config.json": "{}",
    "checkpoints/one/state.pt": "state",
    "tensorboard/events": "curves",
}
LISTED = [name for name in sorted(FILES) if not name.startswith(("checkpoints", "tensorboard"))]


def publish(root: Storage) -> RunManifest:
    """Write manifest.json for what is there."""
    manifest = RunManifest(
        job_id="nano-lora-12345678",
        kind="train",
        spec_sha256="0" * 64,
        created="2026-11-22T12:00:00+00:00",
        versions={"python": "3.11.7"},
        base=BaseModelRecord(name="openai/whisper-tiny", revision=None, weights_sha256={"model.safetensors": "1"}),
        data={"train": {"rows": 3}, "sentences_in_both": 0},
        wer={"base": 0.5, "tuned": 0.25},
        promoted=True,
        files=file_records(root),
    )
    root.write_text(artifacts.MANIFEST, manifest.model_dump_json(indent=2))
    return manifest


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A complete run."""
    storage = Storage(f"{tmp_path}/run" if request.param == "local" else f"memory://{tmp_path}/run")
    for name, content in FILES.items():
        storage.write_text(name, content)
    publish(storage)
    return storage


def test_a_manifest_comes_back_as_it_was_written(root: Storage) -> None:
    root.remove(artifacts.MANIFEST)
    assert publish(root) == read_manifest(root)
    assert RunManifest.model_validate_json(root.read_bytes("manifest.json")) == read_manifest(root)


def test_every_file_is_listed_but_what_serves_to_go_on(root: Storage) -> None:
    records = read_manifest(root).files
    assert [record.path for record in records] == LISTED
    for record in records:
        assert (record.size_bytes, record.sha256) == (len(FILES[record.path]), root.sha256(record.path))


def test_an_untouched_run_has_no_problems(root: Storage) -> None:
    report = verify(root)
    assert report.problems == []
    assert report.files == len(LISTED)
    assert report.size_bytes == sum(len(FILES[name]) for name in LISTED)


def test_what_serves_to_go_on_may_change_or_go(root: Storage) -> None:
    root.write_text("checkpoints/one/state.pt", "another")
    root.write_text("checkpoints/two/state.pt", "new")
    root.remove("tensorboard")
    assert verify(root).problems == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "adapter/adapter_model.safetensors: missing"),
        ("tenso", "adapter/adapter_model.safetensors: 5 bytes, 7 expected"),
        ("", "adapter/adapter_model.safetensors: 0 bytes, 7 expected"),
        ("Tensors", "adapter/adapter_model.safetensors: content differs from what was published (SHA-256)"),
    ],
    ids=["missing", "truncated", "emptied", "changed"],
)
def test_verify_names_what_happened_to_a_file(root: Storage, content: str | None, problem: str) -> None:
    root.remove("adapter/adapter_model.safetensors")
    if content is not None:
        root.write_text("adapter/adapter_model.safetensors", content)
    assert verify(root).problems == [problem]


def test_verify_finds_files_that_were_added(root: Storage) -> None:
    root.write_text("merged/model.safetensors", "stranger")
    assert verify(root).problems == ["merged/model.safetensors: not in manifest.json"]


def test_verify_finds_everything_at_once(root: Storage) -> None:
    root.remove("merged")
    root.write_text("spec.json", "[]")
    root.write_text("more.txt", "x")
    assert [problem.split(":")[0] for problem in verify(root).problems] == [
        "merged/config.json",
        "spec.json",
        "more.txt",
    ]


def test_a_root_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    for read in (verify, read_manifest):
        with pytest.raises(NotFoundError, match="no such folder"):
            read(Storage(f"{tmp_path}/nowhere"))


def test_a_run_without_a_manifest_is_not_finished(root: Storage) -> None:
    root.remove("manifest.json")
    with pytest.raises(NotFinishedError, match=r"no manifest\.json: the run is not complete"):
        verify(root)
    root.remove("spec.json")
    with pytest.raises(NotFinishedError, match="this is not the root of a run"):
        verify(root)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "the file"), ('{"format": 2}', "format"), ('{"format": 1}', "job_id"), ("\0", "the file")],
)
def test_a_manifest_that_cannot_be_read_says_where(root: Storage, content: str, reason: str) -> None:
    root.write_text("manifest.json", content)
    with pytest.raises(NotFinishedError, match=rf"manifest\.json: cannot be read: {reason}"):
        verify(root)


def test_an_unknown_key_in_a_manifest_is_not_passed_over(root: Storage) -> None:
    content = json.loads(root.read_bytes("manifest.json")) | {"extra": 1}
    root.write_json("manifest.json", content)
    with pytest.raises(NotFinishedError, match="extra"):
        verify(root)


def test_records_are_frozen() -> None:
    record = FileRecord(path="a", size_bytes=1, sha256="0")
    with pytest.raises(ValueError, match="frozen"):
        record.path = "b"  # type: ignore[misc]
