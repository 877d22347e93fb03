"""A root belongs to one spec; a stage whose result stands is passed over; nothing that is not ours is deleted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from engine import job, read_lines
from rich.console import Console

from jobs.progress import Reporter
from jobs.recorder import Recorder
from jobs.stages import OURS, Stages, claim_root
from service.errors import InputError, JobFailedError
from service.spec.job import JobSpec
from service.storage import Storage


def spec_of(root: Path, **training: Any) -> JobSpec:
    return job("openai/whisper-tiny", Path("/data"), root, **training)


def claim(root: Path, *, overwrite: bool = False, **training: Any) -> None:
    claim_root(spec_of(root, **training), Storage(str(root)), overwrite=overwrite)


def begin(root: Path) -> None:
    """Leave what a run leaves once its data have been checked."""
    Storage(str(root)).write_json("stages/prepare.json", {"seconds": 0, "result": {}})


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_new_root_gets_the_complete_spec(root: Path) -> None:
    claim(root, lora_r=4)
    kept = JobSpec.model_validate_json((root / "spec.json").read_text())
    assert kept == spec_of(root, lora_r=4)


def test_an_empty_folder_is_as_good_as_a_new_one(root: Path) -> None:
    root.mkdir()
    claim(root)
    assert files(root) == {"spec.json"}


@pytest.mark.setting("outdir")
def test_the_same_spec_claims_its_root_again_and_nothing_changes(root: Path) -> None:
    claim(root)
    (root / "data").mkdir()
    (root / "data/train.arrow").write_text("rows")
    claim(root)
    assert files(root) == {"spec.json", "data/train.arrow"}


@pytest.mark.setting("outdir")
def test_another_spec_is_refused_with_the_settings_that_differ(root: Path) -> None:
    claim(root)
    begin(root)
    with pytest.raises(InputError) as caught:
        claim(root, lora_r=4, lr=0.5)
    message = str(caught.value)
    assert "holds a run of another spec (it differs in training.lr, training.lora_r)" in message
    assert "--overwrite" in message
    assert JobSpec.model_validate_json((root / "spec.json").read_text()) == spec_of(root)


def test_before_the_data_are_checked_a_mended_spec_is_simply_taken(root: Path) -> None:
    claim(root)
    claim(root, lora_r=4)
    assert JobSpec.model_validate_json((root / "spec.json").read_text()) == spec_of(root, lora_r=4)


def test_a_pattern_in_another_order_is_another_spec(root: Path) -> None:
    claim(root, lora_rank_pattern={"fc1": 4, "fc2": 8})
    begin(root)
    with pytest.raises(InputError, match=r"training\.lora_rank_pattern"):
        claim(root, lora_rank_pattern={"fc2": 8, "fc1": 4})


def test_name_and_patience_do_not_make_another_run(root: Path) -> None:
    claim(root)
    renamed = spec_of(root).model_copy(update={"name": "other"})
    patient = renamed.model_copy(update={"resources": renamed.resources.model_copy(update={"wait_s": 1.0})})
    claim_root(patient, Storage(str(root)), overwrite=False)


@pytest.mark.parametrize("content", ["{", '{"training": {"lora_rr": 4}}', '{"kind": "bake"}', "\x00"])
def test_a_spec_that_cannot_be_read_is_refused(root: Path, content: str) -> None:
    root.mkdir()
    (root / "spec.json").write_text(content)
    with pytest.raises(InputError, match=r"spec\.json: cannot be read by this version"):
        claim(root)


def test_a_folder_of_other_files_is_refused_and_left_alone(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        claim(root)
    assert files(root) == {"thesis.txt"}


def fill(root: Path) -> None:
    """What a finished run leaves, and files that are none of its own."""
    for name in OURS:
        path = root / name if "." in name else root / name / "deep/file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("ours")
    (root / "spec.json").write_text(spec_of(root).to_json())
    for name in ("thesis.txt", "database/train.arrow", "spec.json.bak"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("theirs")


@pytest.mark.setting("outdir")
def test_overwriting_deletes_a_run_and_nothing_else(root: Path) -> None:
    fill(root)
    claim(root, overwrite=True, lora_r=4)
    assert files(root) == {"spec.json", "thesis.txt", "database/train.arrow", "spec.json.bak"}
    assert JobSpec.model_validate_json((root / "spec.json").read_text()).training.lora_r == 4


def contents(root: Path) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in files(root)}


@pytest.mark.setting("outdir")
def test_without_that_word_nothing_is_deleted_or_changed(root: Path) -> None:
    fill(root)
    begin(root)
    before = contents(root)
    claim(root)
    assert contents(root) == before, "the same spec goes on with what is there"
    for other in ({"lora_r": 4}, {"seed": 1}, {"lora_alpha_pattern": {"fc1": 4}}):
        with pytest.raises(InputError, match="--overwrite"):
            claim(root, **other)
        assert contents(root) == before


@pytest.mark.setting("outdir")
def test_a_run_goes_on_in_a_folder_of_another_name(root: Path) -> None:
    claim(root)
    begin(root)
    root.rename(root.with_name("moved"))
    claim(root.with_name("moved"))
    with pytest.raises(InputError, match=r"training\.lora_r"):
        claim(root.with_name("moved"), lora_r=4)


@pytest.mark.setting("outdir")
def test_results_go_to_outdir_itself_or_else_to_a_folder_named_by_the_spec() -> None:
    named = JobSpec(training={"outdir": "/results/mine"}, storage={"uri": "s3://bucket/runs"})
    plain = JobSpec(storage={"uri": "s3://bucket/runs/"})
    assert named.root == "/results/mine"
    assert plain.root == f"s3://bucket/runs/{plain.job_id}"
    assert plain.sha256 == named.sha256
    assert plain.job_id.endswith(plain.sha256[:8])


def test_overwriting_takes_a_run_whose_spec_cannot_be_read(root: Path) -> None:
    fill(root)
    (root / "spec.json").write_text("{")
    claim(root, overwrite=True)
    assert "manifest.json" not in files(root)


def test_overwriting_writes_beside_files_that_are_no_runs(root: Path) -> None:
    root.mkdir()
    (root / "thesis.txt").write_text("years of work")
    claim(root, overwrite=True)
    assert files(root) == {"spec.json", "thesis.txt"}


@pytest.mark.parametrize("name", ["README.md", "data/train.csv", "merged/model.safetensors", "evaluation/notes.txt"])
def test_overwriting_never_deletes_what_no_run_has_left_there(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text("theirs")
    with pytest.raises(InputError, match=f"holds {name.split('/')[0]}, but no run"):
        claim(root, overwrite=True)
    assert (root / name).read_text() == "theirs"


def test_the_manifest_goes_first_and_the_spec_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root)
    begin(root)
    removed: list[str] = []
    monkeypatch.setattr(Storage, "remove", lambda self, name: removed.append(name))
    with pytest.raises(InputError):
        claim(root, overwrite=True, lora_r=4)  # nothing was removed, so another spec still stands there
    assert removed[0] == "manifest.json"
    assert removed[-1] == "spec.json"
    assert set(removed) == set(OURS)


def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        claim(tmp_path / "file/run")


class Job:
    """Stages on one root, their events, and how often each did its work."""

    def __init__(self, root: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.stages = Stages(Storage(str(root)), self.events.append)
        self.worked: list[str] = []

    def run(self, name: str, result: Any = None) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            self.worked.append(name)
            return {"by": name, "value": 1.5, "none": None} if result is None else result

        return self.stages.run(name, f"doing {name}", work)


def test_a_stage_is_done_once_and_its_result_kept(root: Path) -> None:
    first, second = Job(root), Job(root)
    results = [one.run("train") for one in (first, first, second)]
    assert results == [{"by": "train", "value": 1.5, "none": None}] * 3
    assert first.worked == ["train"]
    assert second.worked == []
    assert [event["status"] for event in first.events] == ["started", "done", "skipped"]
    assert [event["status"] for event in second.events] == ["skipped"]
    assert second.stages.seconds == first.stages.seconds
    assert first.stages.seconds["train"] >= 0


def test_a_stage_that_failed_is_done_again(root: Path) -> None:
    def fail() -> dict[str, Any]:
        raise JobFailedError("no")

    with pytest.raises(JobFailedError):
        Job(root).stages.run("train", "", fail)
    assert files(root) == set()
    assert Job(root).run("train")["by"] == "train"


def test_events_are_kept_but_those_that_only_move_a_bar(root: Path) -> None:
    root.mkdir()
    screen = io.StringIO()
    recorder = Recorder(Storage(str(root)), Reporter(Console(file=screen, width=200)))
    recorder.take({"event": "stage", "stage": "train", "status": "started", "text": "two workers"})
    recorder.take({"event": "transcribed", "what": "base", "done": 1, "total": 2})
    recorder.take({"event": "rows", "split": "train", "rows": 10})
    step = {"event": "step", "step": 1, "steps": 2, "loss": 1.0, "lr": 0.1, "clips_per_s": 2.0}
    recorder.take(step | {"logged": False})
    recorder.take(step | {"step": 2, "logged": True})
    recorder.take({"event": "traceback", "rank": 0, "text": "Traceback: ñ"})
    kept = read_lines(root / "events.jsonl")
    assert [event["event"] for event in kept] == ["stage", "step", "traceback"]
    assert kept[1]["step"] == 2
    assert "logged" not in json.dumps(kept)
    assert recorder.tracebacks == ["Traceback: ñ"]
    assert "train  two workers" in screen.getvalue()


def test_a_line_that_was_cut_off_in_mid_writing_is_cut_away(root: Path) -> None:
    root.mkdir()
    (root / "events.jsonl").write_text('{"event": "stage"}\n{"event": "st')
    recorder = Recorder(Storage(str(root)), Reporter(Console(file=io.StringIO())))
    recorder.take({"event": "checkpoint", "step": 3})
    assert [event["event"] for event in read_lines(root / "events.jsonl")] == ["stage", "checkpoint"]


def test_events_that_cannot_be_written_are_missed_once_and_nothing_ends(tmp_path: Path) -> None:
    said = io.StringIO()
    with small_disk(tmp_path / "disk", "4k"):
        recorder = Recorder(Storage(str(tmp_path / "disk")), Reporter(Console(file=said, width=500)))
        for _ in range(300):
            recorder.take({"event": "checkpoint", "step": 3, "filler": "x" * 100})
    assert said.getvalue().count("events.jsonl cannot be written (No space left on device)") == 1
