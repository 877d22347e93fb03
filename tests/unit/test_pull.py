"""What `pull` brings is what was published: all of it or some artifacts, gone on with and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from disks import small_disk

from service.artifacts import PULLED, FileRecord, RunManifest, file_records, read_manifest, verify
from service.cli.main import cli
from service.errors import InputError, VerificationError
from service.pull import PullReport, artifacts_of, pull
from service.storage import Storage

FILES = {
    "README.md": "card",
    "spec.json": "{}",
    "metrics.json": "{}",
    "events.jsonl": "{}\n",
    "adapter/adapter_model.safetensors": "tensors",
    "merged/config.json": "{}",
    "merged/model.safetensors": "weights",
    "exports/ggml-f16/ggml-model.bin": "half",
    "exports/ggml-q4_0/ggml-model.bin": "quarter",
    "exports/openai/model.pt": "pickle",
}
ALWAYS = {"README.md", "spec.json", "metrics.json", "manifest.json"}
WER = {"base": 0.5, "tuned": 0.25, "hf": 0.26, "ggml-f16": 0.27, "ggml-q4_0": 0.9}


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A complete run with a refused export."""
    storage = Storage(f"{tmp_path}/run" if request.param == "local" else f"memory://{tmp_path}/run")
    for name, content in FILES.items():
        storage.write_text(name, content)
    publish(storage)
    return storage


def publish(storage: Storage, files: list[FileRecord] | None = None) -> None:
    manifest = RunManifest(
        job_id="one", kind="train", spec_sha256="0", created="now", versions={}, base=None, data={}, wer=WER,
        promoted=True, files=file_records(storage) if files is None else files,
        refused={"ggml-q4_0": "its WER is 90.0%"},
    )  # fmt: skip
    storage.write_text("manifest.json", manifest.model_dump_json())


def bring(root: Storage, folder: Path, **options: Any) -> PullReport:
    return pull(root, read_manifest(root), folder, **options)


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {PULLED}


def test_the_artifacts_of_a_run_are_told_with_what_was_measured(root: Storage) -> None:
    found = {one.name: one for one in artifacts_of(read_manifest(root))}
    assert list(found) == ["adapter", "hf", "ggml-f16", "ggml-q4_0", "openai"]
    assert (found["adapter"].wer, found["hf"].wer, found["ggml-f16"].wer, found["openai"].wer) == (
        0.25,
        0.26,
        0.27,
        None,
    )
    assert (found["hf"].folder, found["hf"].files, found["hf"].size_bytes) == ("merged", 2, 9)
    assert found["ggml-q4_0"].refused == "its WER is 90.0%"
    assert found["ggml-f16"].refused is None


def test_all_of_a_run_is_brought_but_what_was_refused(root: Storage, tmp_path: Path) -> None:
    report = bring(root, tmp_path / "here")
    assert files(tmp_path / "here") == (FILES.keys() | {"manifest.json"}) - {"exports/ggml-q4_0/ggml-model.bin"}
    assert report.left_out == {"ggml-q4_0": "its WER is 90.0%"}
    assert verify(Storage(str(tmp_path / "here"))).problems == [], "what was left out on purpose is not missed"
    (tmp_path / "here/merged/config.json").unlink()
    assert verify(Storage(str(tmp_path / "here"))).problems == ["merged/config.json: missing"]
    bring(root, tmp_path / "here")
    assert all(
        (tmp_path / "here" / name).read_text() == FILES[name] for name in files(tmp_path / "here") & FILES.keys()
    )


def test_a_whole_pulled_run_passes_verify(root: Storage, tmp_path: Path) -> None:
    bring(root, tmp_path / "here", refused=True)
    assert verify(Storage(str(tmp_path / "here"))).problems == []


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["adapter"], {"adapter/adapter_model.safetensors"}),
        (["hf"], {"merged/config.json", "merged/model.safetensors"}),
        (["ggml"], {"exports/ggml-f16/ggml-model.bin"}),
        (["ggml-f16", "openai"], {"exports/ggml-f16/ggml-model.bin", "exports/openai/model.pt"}),
    ],
)
def test_only_some_artifacts_come_with_what_describes_the_run(
    root: Storage, tmp_path: Path, only: list[str], expected: set[str]
) -> None:
    bring(root, tmp_path / "here", only=only)
    assert files(tmp_path / "here") == expected | ALWAYS


def test_an_artifact_that_is_not_there_or_was_refused_is_an_error(root: Storage, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'--only: "onnx" is no artifact of this run; it has adapter, hf, ggml-f16'):
        bring(root, tmp_path / "here", only=["onnx"])
    with pytest.raises(InputError, match=r'"ggml-q4_0" was refused: its WER is 90.0%; --refused brings it'):
        bring(root, tmp_path / "here", only=["ggml-q4_0"])
    assert not (tmp_path / "here").exists()
    bring(root, tmp_path / "here", only=["ggml-q4_0"], refused=True)
    assert "exports/ggml-q4_0/ggml-model.bin" in files(tmp_path / "here")


def test_what_is_there_and_right_is_passed_over_and_what_is_wrong_is_mended(root: Storage, tmp_path: Path) -> None:
    assert bring(root, tmp_path / "here").downloaded == 9
    assert bring(root, tmp_path / "here").downloaded == 0
    (tmp_path / "here/merged/config.json").write_text("[]")
    (tmp_path / "here/README.md").unlink()
    assert bring(root, tmp_path / "here").downloaded == 2
    assert (tmp_path / "here/merged/config.json").read_text() == "{}"


def test_a_file_that_was_changed_since_is_refused_and_does_not_appear(root: Storage, tmp_path: Path) -> None:
    root.write_text("merged/config.json", "[]")
    with pytest.raises(VerificationError, match=r"merged/config\.json: is not what manifest\.json says"):
        bring(root, tmp_path / "here")
    assert not (tmp_path / "here/merged/config.json").exists()
    assert not (tmp_path / "here/manifest.json").exists(), "it is written last"


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "merged/../../outside.txt"])
def test_a_manifest_that_leads_out_of_the_folder_is_refused(root: Storage, tmp_path: Path, name: str) -> None:
    publish(root, [FileRecord(path=name, size_bytes=1, sha256="0")])
    with pytest.raises(VerificationError, match="leads out of the folder"):
        bring(root, tmp_path / "deep/here")
    assert not (tmp_path / "deep").exists()


def test_progress_ends_at_the_whole(root: Storage, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    bring(root, tmp_path / "here", refused=True, progress=lambda done, total: told.append((done, total)))
    size = sum(map(len, FILES.values()))
    assert told[-1] == (size, size)


def invoke(*words: Any) -> Result:
    return CliRunner().invoke(cli, list(map(str, words)))


def test_the_commands_print_text_and_json(root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    listed = invoke("artifacts", root.uri)
    assert listed.exit_code == 0
    assert "ggml-q4_0" in listed.stdout
    assert "refused: its WER is 90.0%" in listed.stdout
    assert [one["name"] for one in json.loads(invoke("artifacts", root.uri, "-o", "json").stdout)][:2] == [
        "adapter",
        "hf",
    ]

    brought = invoke("pull", root.uri, tmp_path / "here")
    assert brought.exit_code == 0, brought.stderr
    assert "10 files" in brought.stdout
    assert "warning: ggml-q4_0 is left out, it was refused: its WER is 90.0%" in brought.stderr
    report = json.loads(invoke("pull", root.uri, tmp_path / "here", "--only", "hf", "-o", "json").stdout)
    assert (report["downloaded"], report["artifacts"]) == (0, ["hf"])

    assert invoke("pull", root.uri, tmp_path / "here", "--only", "onnx").exit_code == 2
    root.remove("manifest.json")
    assert invoke("pull", root.uri, tmp_path / "here").exit_code == 6
    assert invoke("artifacts", root.uri).exit_code == 6


def test_a_folder_that_cannot_be_written_is_named(root: Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = invoke("pull", root.uri, tmp_path / "file")
    assert result.exit_code == 2
    assert f"{tmp_path}/file: cannot be written" in result.stderr


def test_a_full_disk_is_a_matter_of_storage(root: Storage, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4k"):
        result = invoke("pull", root.uri, tmp_path / "disk/here")
        assert result.exit_code == 11
        assert "here: cannot be written (No space left on device); make room, or give another folder" in result.stderr
