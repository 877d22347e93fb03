"""A run is gone on with only while what it reads is what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from engine import job

from jobs.inputs import require_same_inputs, sha256_of
from jobs.sources import resolve_model
from service.errors import InputError, SpecError
from service.spec.job import JobSpec
from service.storage import Storage


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A job whose base model and CSVs are local files."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.safetensors").write_bytes(b"weights")
    (tmp_path / "base/config.json").write_text("{}")
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text("path,text\na.wav,one\n")
    return job(tmp_path / "base", tmp_path, tmp_path / "run")


def start(spec: JobSpec) -> None:
    require_same_inputs(spec, Storage(spec.root))
    Storage(spec.root).write_json("stages/prepare.json", {})  # the data have been checked: the run has begun


def test_before_the_data_are_checked_mended_inputs_are_simply_taken(spec: JobSpec, tmp_path: Path) -> None:
    require_same_inputs(spec, Storage(spec.root))
    (tmp_path / "train.csv").write_text("path,text\nb.wav,mended\n")
    require_same_inputs(spec, Storage(spec.root))
    recorded = Storage(spec.root).read_json("stages/inputs.json")
    assert recorded[str(tmp_path / "train.csv")] == sha256_of(tmp_path / "train.csv")


@pytest.mark.parametrize("name", ["train.csv", "val.csv", "base/model.safetensors"])
def test_a_changed_input_is_named_and_refused(spec: JobSpec, tmp_path: Path, name: str) -> None:
    start(spec)
    start(spec)
    with open(tmp_path / name, "a") as file:
        file.write("b.wav,two\n")
    with pytest.raises(
        InputError, match=r"has changed since the run in .* began; give another outdir, or --overwrite"
    ) as caught:
        start(spec)
    assert [fault.where for fault in caught.value.faults] == [str(tmp_path / name)]


def test_inputs_that_this_machine_cannot_see_are_passed_over(spec: JobSpec, tmp_path: Path) -> None:
    start(spec)
    (tmp_path / "val.csv").unlink()
    shutil.rmtree(tmp_path / "base")
    start(spec)


def test_files_that_are_not_read_may_change(spec: JobSpec, tmp_path: Path) -> None:
    start(spec)
    (tmp_path / "base/notes.md").write_text("new")
    (tmp_path / "other.csv").write_text("new")
    start(spec)


def test_an_evaluation_reads_its_csv_and_the_models_weights_or_adapter(spec: JobSpec, tmp_path: Path) -> None:
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/adapter_model.safetensors").write_bytes(b"adapter")
    evaluation = {"model": str(tmp_path / "run"), "csv": str(tmp_path / "val.csv")}
    content: dict[str, Any] = {"kind": "evaluate", "evaluation": evaluation, "storage": {"uri": str(tmp_path / "runs")}}
    scoring = JobSpec.model_validate(content)
    start(scoring)
    (tmp_path / "train.csv").write_text("changed")
    start(scoring)
    (tmp_path / "run/adapter/adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        start(scoring)


def test_hashes_are_sha_256_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def stands_for(base: str, adapter: Path | None = None, run: Path | None = None) -> dict[str, str | None]:
    places = {"adapter": str(adapter) if adapter else None, "run": str(run) if run else None}
    return {"base": base, "revision": None} | places


class TestWhatStandsBehindAModelsName:
    """A hub id, a checkpoint, an adapter or a run."""

    @pytest.fixture
    def adapter(self, tmp_path: Path) -> Path:
        folder = tmp_path / "run/adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "openai/whisper-tiny"}')
        return folder

    def test_a_hub_id_is_a_checkpoint(self) -> None:
        assert resolve_model("openai/whisper-tiny") == stands_for("openai/whisper-tiny")

    def test_a_folder_with_a_config_is_a_checkpoint(self, tiny: Path) -> None:
        assert resolve_model(str(tiny)) == stands_for(str(tiny))

    def test_an_adapter_brings_its_base(self, adapter: Path) -> None:
        assert resolve_model(str(adapter)) == stands_for("openai/whisper-tiny", adapter)

    def test_a_run_is_its_adapter(self, adapter: Path) -> None:
        (adapter.parent / "spec.json").write_text("{}")
        found = stands_for("openai/whisper-tiny", adapter, run=adapter.parent)
        assert resolve_model(str(adapter.parent)) == found

    def test_another_base_may_be_given(self, adapter: Path) -> None:
        assert resolve_model(str(adapter), "export.source", "openai/whisper-base")["base"] == "openai/whisper-base"

    def test_a_run_without_an_adapter_yet_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "spec.json").write_text("{}")
        with pytest.raises(SpecError, match=r"is not a checkpoint \(config\.json\), a PEFT adapter"):
            resolve_model(str(tmp_path))

    def test_any_other_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match=r"evaluation\.model"):
            resolve_model(str(tmp_path))
