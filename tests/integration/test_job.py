"""The main job from spec to manifest.json, on a local Ray with two workers, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import batch_of, job, logits_of, read_lines
from huggingface_hub import ModelCard
from peft import PeftModel
from running import Finished, run
from transformers import WhisperForConditionalGeneration, pipeline

from jobs.audio import SAMPLE_RATE_HZ, read_audio
from service.artifacts import read_manifest, verify
from service.spec.job import JobSpec
from service.storage import Storage

pytestmark = pytest.mark.slow

RATE_KEYS = {
    "wer", "wer_raw", "cer", "cer_raw", "utterances", "words", "substitutions", "deletions", "insertions",
    "languages", "wer_interval",
}  # fmt: skip


class Job:
    """A finished job."""

    def __init__(self, spec: JobSpec, file: Path, finished: Finished) -> None:
        self.spec, self.file, self.finished = spec, file, finished
        self.root = Path(spec.root)

    @property
    def storage(self) -> Storage:
        return Storage(str(self.root))

    def read(self, name: str) -> Any:
        return json.loads((self.root / name).read_text())


@pytest.fixture(scope="module")
def done(nano: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """LoRA on speech: two workers, three epochs, two evaluations."""
    folder = tmp_path_factory.mktemp("job")
    sections = {
        "resources": {"workers": 2},
        "engine": {"report_to": ["tensorboard"]},
        "evaluation": {"max_new_tokens": 24, "bootstrap": 100},
    }
    settings = {"per_dev_batch": 4, "epochs": 3, "lr": 1e-2, "eval_steps": 8, "save_steps": 4, "logging_steps": 5}
    spec = job(nano, manifest, folder / "run", sections, **settings)
    (folder / "spec.json").write_text(spec.to_json())
    return Job(spec, folder / "spec.json", run("--config", folder / "spec.json", "-o", "json"))


def test_the_result_alone_is_on_stdout_and_no_library_speaks(done: Job) -> None:
    result = done.finished.json()
    assert result.pop("root") == str(done.root)
    assert result == done.read("metrics.json")
    for word in ("Warning", "warning", "Traceback", "WARN", "INFO", "ray.", "deprecat"):
        assert word not in done.finished.stderr, done.finished.stderr
    for stage in ("prepare", "train", "merge", "describe"):
        assert f"  {stage}  " in done.finished.stderr


@pytest.mark.setting("outdir", "merge_lora")
def test_the_layout_is_that_of_the_design(done: Job) -> None:
    assert sorted(path.name for path in done.root.iterdir()) == [
        "README.md", "adapter", "checkpoints", "data", "evaluation", "events.jsonl", "manifest.json", "merged",
        "metrics.json", "rejects.csv", "report.html", "spec.json", "stages", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in (done.root / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    merged = {path.name for path in (done.root / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} < merged
    assert sorted(path.name for path in (done.root / "evaluation").iterdir()) == [
        "base.jsonl", "merged.jsonl", "tuned.jsonl",
    ]  # fmt: skip


def test_the_spec_that_was_kept_is_the_one_that_ran(done: Job) -> None:
    kept = JobSpec.model_validate(done.read("spec.json"))
    assert kept.training == done.spec.training
    assert (kept.sha256, kept.job_id) == (done.spec.sha256, done.spec.job_id)


def test_the_manifest_holds_and_knows_what_the_run_came_from(done: Job) -> None:
    assert verify(done.storage).problems == []
    manifest, metrics = read_manifest(done.storage), done.read("metrics.json")
    assert manifest.job_id == metrics["job_id"] == done.spec.job_id
    assert manifest.spec_sha256 == done.spec.sha256
    assert manifest.kind == "train"
    assert manifest.wer == {name: metrics[name]["wer"] for name in ("base", "tuned")} | {
        "hf": metrics["artifacts"]["hf"]["wer"]
    }
    assert manifest.promoted is metrics["promoted"]
    assert manifest.base is not None
    assert manifest.base.weights_sha256.keys() == {"model.safetensors"}
    assert {"python", "torch", "transformers", "peft", "ray"} < manifest.versions.keys()
    assert manifest.data["train"]["rows"] + manifest.data["val"]["rows"] == 48
    assert manifest.data["sentences_in_both"] == manifest.data["clips_in_both"] == 0
    listed = {record.path for record in manifest.files}
    assert not any(path.startswith(("checkpoints/", "tensorboard/")) for path in listed)
    assert {"spec.json", "metrics.json", "events.jsonl", "adapter/adapter_model.safetensors"} < listed
    last = max(done.root.rglob("*"), key=lambda path: path.stat().st_mtime if path.is_file() else 0)
    assert last == done.root / "manifest.json", "it is written last"


def test_metrics_have_the_keys_of_the_design(done: Job) -> None:
    metrics = done.read("metrics.json")
    assert metrics.keys() == {
        "job_id", "base", "tuned", "adapter", "training", "artifacts", "merge", "promoted", "promotion_reasons",
        "difference", "seconds",
    }  # fmt: skip
    for name in ("base", "tuned"):
        assert metrics[name].keys() == RATE_KEYS
        assert metrics[name]["utterances"] == len(read_lines(done.root / f"evaluation/{name}.jsonl"))
        assert sorted(metrics[name]["languages"]) == ["en", "es"]
    adapter = metrics["adapter"]
    assert (adapter["modules"], adapter["zero_updates"]) == (32, 0)
    assert sum(part["changed"] for part in adapter["coverage"].values()) == 32
    assert metrics["merge"]["max_logit_difference"] <= 1e-4
    assert metrics["artifacts"]["hf"].keys() == {
        "wer", "wer_compared", "cer", "utterances", "identical", "rtf", "size_bytes"
    }  # fmt: skip
    assert metrics["artifacts"]["hf"]["identical"] == 1.0
    training = metrics["training"]
    assert training["effective_batch"] == 8
    assert training["steps"] == 3 * -(-read_manifest(done.storage).data["train"]["rows"] // 8)
    assert [entry["step"] for entry in training["history"]][-1] == training["steps"]
    assert metrics["promoted"] is (metrics["tuned"]["wer"] < metrics["base"]["wer"])
    assert metrics["seconds"]["total"] == pytest.approx(
        sum(seconds for stage, seconds in metrics["seconds"].items() if stage != "total"), abs=0.01
    )


def test_learning_new_voices_lowers_the_error_rate(done: Job) -> None:
    metrics = done.read("metrics.json")
    assert metrics["tuned"]["wer"] < metrics["base"]["wer"] - 0.1


def test_events_tell_the_whole_job_in_order(done: Job) -> None:
    found = read_lines(done.root / "events.jsonl")
    stages = [(event["stage"], event["status"]) for event in found if event["event"] == "stage"]
    assert stages == [
        (name, status) for name in ("prepare", "describe", "train", "merge") for status in ("started", "done")
    ]
    steps = done.read("metrics.json")["training"]["steps"]
    logged = [event["step"] for event in found if event["event"] == "step"]
    assert logged == [*range(5, steps, 5), steps]
    checkpoints = [event["step"] for event in found if event["event"] == "checkpoint"]
    assert checkpoints == [*range(4, steps, 4), steps]
    assert next(event.get("what") for event in found if event["event"] == "evaluation") == "base"
    times = [event["time"] for event in found]
    assert times == sorted(times)


def test_training_curves_are_there_for_tensorboard(done: Job) -> None:
    assert list((done.root / "tensorboard").rglob("events.out.tfevents.*"))


def test_as_many_checkpoints_are_kept_as_asked(done: Job) -> None:
    kept = list((done.root / "checkpoints").rglob("state.pt"))
    assert len(kept) == done.spec.engine.keep_checkpoints == 2


@pytest.mark.parametrize("place", [".", "adapter", "merged"])
def test_the_card_has_a_metadata_block_that_the_hub_takes(done: Job, place: str) -> None:
    card = ModelCard.load(done.root / place / "README.md")
    assert card.data.language == ["en", "es"]
    assert card.data.pipeline_tag == "automatic-speech-recognition"
    wer = next(result.metric_value for result in card.data.eval_results if result.metric_type == "wer")
    assert wer == round(100 * done.read("metrics.json")["tuned"]["wer"], 2)


def test_the_report_shows_the_run_and_is_part_of_it(done: Job) -> None:
    metrics, page = done.read("metrics.json"), (done.root / "report.html").read_text("utf-8")
    assert "report.html" in {record.path for record in read_manifest(done.storage).files}
    assert "there is no report.html" not in done.finished.stderr
    for name in ("base", "tuned"):
        assert f">{metrics[name]['wer']:.1%}</span>" in page
    assert "simpler normaliser" not in page, "the words that were compared are kept"
    data = read_manifest(done.storage).data
    for split in ("train", "val"):
        assert sum(data[split]["lengths"]["clips"]) == data[split]["rows"]
        assert sum(data[split]["language_hours"].values()) == pytest.approx(data[split]["hours"], abs=1e-3)
    figures = json.loads(page.split('id="page-data">')[1].split("</script>")[0])["figures"]
    (loss,) = [figure for figure in figures if figure["id"] == "curve-loss"]
    steps = [event["step"] for event in read_lines(done.root / "events.jsonl") if event["event"] == "step"]
    assert loss["data"][0]["x"] == steps


def test_a_report_that_cannot_be_made_fails_no_job(done: Job, tmp_path: Path) -> None:
    """The job goes on at its last step, with a rejects.csv that something has damaged meanwhile."""
    shutil.copytree(done.root, tmp_path / "run")
    for name in ("manifest.json", "report.html"):
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / "rejects.csv").write_bytes(b"split,path,kind,reason\n\xff\n")
    settings = done.spec.training.model_copy(update={"outdir": str(tmp_path / "run")})
    (tmp_path / "spec.json").write_text(done.spec.model_copy(update={"training": settings}).to_json())
    finished = run("--config", tmp_path / "spec.json", "-o", "json")
    assert finished.json()["job_id"] == done.spec.job_id
    assert finished.stderr.count("warning: there is no report.html: InputError: ") == 1
    root = Storage(str(tmp_path / "run"))
    assert verify(root).problems == []
    assert "report.html" not in {record.path for record in read_manifest(root).files}
    last = read_lines(tmp_path / "run" / "events.jsonl")[-1]
    assert last["event"] == "notice"
    assert "rejects.csv: cannot be read" in last["text"]


def test_a_second_run_finds_it_complete_and_changes_nothing(done: Job) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.root.rglob("*")}
    again = run("--config", done.file, "-o", "json")
    assert again.json() == done.finished.json()
    assert "this job is complete already" in again.stderr
    assert again.seconds < done.finished.seconds / 2
    assert {path: path.stat().st_mtime_ns for path in done.root.rglob("*")} == before
    assert verify(done.storage).problems == []


def test_the_merged_folder_is_a_checkpoint_that_transcribes(done: Job) -> None:
    lines = [line for line in read_lines(done.root / "evaluation/tuned.jsonl") if line["language"] == "en"]
    recognise = pipeline("automatic-speech-recognition", model=str(done.root / "merged"), device="cpu")
    # The pipeline would search with five beams; the run was scored greedily.
    options = {"language": "en", "task": "transcribe", "max_new_tokens": 24, "num_beams": 1}
    for line in lines[:3]:
        clip = {"raw": read_audio(line["path"]), "sampling_rate": SAMPLE_RATE_HZ}  # of a path it would want ffmpeg
        assert recognise(clip, generate_kwargs=options)["text"].strip() == line["hypothesis"]


def test_plain_peft_puts_the_adapter_on_the_untouched_base(done: Job, nano: Path, manifest: Path) -> None:
    batch = batch_of(nano, manifest / "val.csv", 2)
    base = WhisperForConditionalGeneration.from_pretrained(nano)
    plain = logits_of(base, batch)
    adapted = logits_of(PeftModel.from_pretrained(base, done.root / "adapter"), batch)
    merged = logits_of(WhisperForConditionalGeneration.from_pretrained(done.root / "merged"), batch)
    assert torch.equal(torch.isfinite(adapted), torch.ones_like(adapted, dtype=torch.bool))
    assert float((adapted - merged).abs().max()) <= 1e-4
    assert float((adapted - plain).abs().max()) > 1.0


def test_a_changed_file_is_found_by_the_verify_command(done: Job, tmp_path: Path) -> None:
    import shutil

    from click.testing import CliRunner

    from service.cli.main import cli

    copy = tmp_path / "copy"
    shutil.copytree(done.root, copy)
    assert CliRunner().invoke(cli, ["verify", str(copy)]).exit_code == 0
    with open(copy / "merged/model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\xff\xff")
    result = CliRunner().invoke(cli, ["verify", str(copy)])
    assert result.exit_code == 10
    assert "merged/model.safetensors: content differs" in result.output


@pytest.mark.parametrize("what", ["run", pytest.param("adapter", marks=pytest.mark.jobs), "base"])
def test_scoring_alone_gives_the_rates_of_the_run(
    done: Job, nano: Path, manifest: Path, tmp_path: Path, cluster: str, what: str
) -> None:
    model = {"run": done.root, "adapter": done.root / "adapter", "base": nano}[what]
    workers = 1 if what == "base" else 2
    arguments = ["kind=evaluate", f"evaluation.model={model}", f"evaluation.csv={manifest / 'val.csv'}"]
    arguments += ["evaluation.max_new_tokens=24", "evaluation.bootstrap=100"]
    arguments += [f"storage.uri={tmp_path}", f"resources.workers={workers}"]
    flags = [word for argument in arguments for word in ("--set", argument)]
    result = run(*flags, "-o", "json", cluster=cluster).json()
    expected = done.read("metrics.json")["base" if what == "base" else "tuned"]
    assert result["model"] == expected
    root = Path(result["root"])
    assert root.parent == tmp_path
    assert verify(Storage(str(root))).problems == []
    assert read_manifest(Storage(str(root))).wer == {"model": expected["wer"]}
    kept = (done.root / f"evaluation/{'base' if what == 'base' else 'tuned'}.jsonl").read_text()
    assert (root / "evaluation/model.jsonl").read_text() == kept
