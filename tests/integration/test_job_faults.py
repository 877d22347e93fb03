"""Jobs that are stopped, that cannot begin, or that fail: how they end, and that the same command goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import job, read_lines, run_engine, saved_adapter, write_csv
from running import Finished, processes_of, run, start, steps_of, wait_until, write

from service.artifacts import verify
from service.storage import Storage

pytestmark = pytest.mark.slow


def test_a_job_killed_in_mid_training_goes_on_to_the_same_end(tiny: Path, tones: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 12, "save_steps": 3, "eval_steps": 20, "lora_dropout": 0.2, "use_dora": True}
    spec = job(tiny, tones, tmp_path / "run", **settings)
    arguments = ("--config", write(spec, tmp_path), "-o", "json")

    killed = start(*arguments, start_new_session=True)
    wait_until(lambda: bool([step for step in steps_of(tmp_path / "run", "checkpoint") if step >= 20]), killed)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "run/manifest.json").exists()
    assert not (tmp_path / "run/adapter").exists()
    base = (tmp_path / "run/evaluation/base.jsonl").read_bytes()

    finished = run(*arguments)
    result = finished.json()
    assert "prepare  done before" in finished.stderr
    models = [event for event in read_lines(tmp_path / "run/events.jsonl") if event["event"] == "model"]
    assert [event["resumed_from_step"] > 0 for event in models] == [False, True]
    assert f"going on from step {models[1]['resumed_from_step']} of 84" in finished.stderr
    assert (tmp_path / "run/evaluation/base.jsonl").read_bytes() == base, "the base is scored once"
    assert verify(Storage(str(tmp_path / "run"))).problems == []

    # Ray's own agents notice that their cluster has died, though they take their time.
    deadline = time.monotonic() + 180
    while left := processes_of(killed.pid):
        assert time.monotonic() < deadline, left
        time.sleep(1)

    # The engine alone, never stopped, ends at the same adapter.
    expected, _ = run_engine(job(tiny, tones, tmp_path / "whole", **settings))
    one, other = saved_adapter(tmp_path / "run/adapter"), saved_adapter(tmp_path / "whole/adapter")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result["training"]["history"] == expected["training"]["history"]


@pytest.mark.jobs
def test_a_dora_job_with_one_worker_on_a_cluster(tiny: Path, tones: Path, tmp_path: Path, cluster: str) -> None:
    flags = ["--base-model", tiny, "--train-csv", tones / "train.csv", "--val-csv", tones / "val.csv"]
    flags += ["--outdir", tmp_path / "run", "--use-dora", "--lora-r", 4, "--lora-target-modules", "q_proj", "v_proj"]
    flags += ["--lr", "1e-3", "--epochs", 2, "--set", "evaluation.max_new_tokens=6", "--eval-steps", 4]
    finished = run(*flags, cluster=cluster)
    assert finished.code == 0, finished.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["adapter"]["modules"] == 12
    assert metrics["merge"]["max_logit_difference"] <= 1e-4
    assert any("lora_magnitude_vector" in name for name in saved_adapter(tmp_path / "run/adapter"))
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["use_dora"] is True
    assert verify(Storage(str(tmp_path / "run"))).problems == []
    assert metrics["job_id"] in finished.stdout
    assert "tiny-whisper-dora" in metrics["job_id"]
    for text in ("all 12 adapted modules changed", f"whisper-jobs verify {tmp_path / 'run'}"):
        assert text in finished.stdout


def evaluate(model: Path, csv: Path, root: Path, cluster: str | None, *more: str) -> Finished:
    settings = {
        "kind": "evaluate",
        "evaluation.model": model,
        "evaluation.csv": csv,
        "evaluation.max_new_tokens": 6,
        "training.outdir": root,
    }
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return run(*flags, *more, "-o", "json", cluster=cluster)


def test_bad_rows_end_the_job_with_their_lines_and_mended_ones_are_scored(
    tiny: Path, tones: Path, tmp_path: Path, cluster: str
) -> None:
    shutil.copytree(tones, tmp_path / "data")
    rows = [("00.wav", "one", "en"), ("gone.wav", "two", "en"), ("01.wav", "", "en"), ("02.wav", "three", "xx")]
    csv = write_csv(tmp_path / "data/test.csv", rows)
    finished = evaluate(tiny, csv, tmp_path / "run", cluster)
    assert finished.code == 2
    error = finished.error()
    places = [fault["where"].rsplit(", ", 1)[-1] for fault in error["faults"]]
    assert places == ["line 3", "line 4", "line 5", "3 rows cannot be used"]
    assert error["faults"][0]["value"] == str(tmp_path / "data/gone.wav")
    assert error["exit_code"] == 2
    assert not (tmp_path / "run/manifest.json").exists()

    write_csv(csv, rows[:1])
    assert evaluate(tiny, csv, tmp_path / "run", cluster).json()["model"]["utterances"] == 1


@pytest.mark.parametrize("local", [True, False], ids=["local Ray", "cluster"])
def test_a_job_that_does_not_fit_ends_with_what_is_missing(
    tiny: Path, tones: Path, tmp_path: Path, cluster: str, local: bool
) -> None:
    workers = ["--set", "resources.workers=500", "--set", "resources.wait_s=1"]
    address = None if local else cluster
    finished = evaluate(tiny, tones / "val.csv", tmp_path / "run", address, *workers)
    assert finished.code == 9
    message = finished.error()["error"]
    assert "500 workers ask for 500 CPUs (there are " in message
    assert ("this machine" if local else "the cluster") in message
    assert "Lower resources.workers" in message


def test_gpus_that_are_not_there_are_missed_by_name(tiny: Path, tones: Path, tmp_path: Path, cluster: str) -> None:
    gpus = ["--set", "resources.gpus_per_worker=1", "--set", "resources.wait_s=0"]
    finished = evaluate(tiny, tones / "val.csv", tmp_path / "run", cluster, *gpus)
    assert finished.code == 9
    assert "1 GPU (there are 0)" in finished.error()["error"]


def test_a_cluster_that_does_not_answer_is_named(tiny: Path, tones: Path, tmp_path: Path) -> None:
    finished = evaluate(tiny, tones / "val.csv", tmp_path / "run", "127.0.0.1:1")
    assert finished.code == 9
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in finished.error()["error"]


@pytest.mark.jobs
def test_another_spec_is_refused_until_told_to_overwrite_and_then_replaces_the_run_alone(
    tiny: Path, tones: Path, tmp_path: Path, cluster: str
) -> None:
    root, csv = tmp_path / "run", tones / "val.csv"
    first = evaluate(tiny, csv, root, cluster).json()
    (root / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}

    refused = evaluate(tiny, csv, root, cluster, "--set", "evaluation.num_beams=2")
    assert refused.code == 2
    assert "holds a run of another spec (it differs in evaluation.num_beams)" in refused.error()["error"]
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    replaced = evaluate(tiny, csv, root, cluster, "--set", "evaluation.num_beams=2", "--overwrite").json()
    assert replaced["job_id"] != first["job_id"]
    assert (root / "notes.txt").read_text() == "mine"
    events = read_lines(root / "events.jsonl")
    assert [event["stage"] for event in events if event["event"] == "stage"].count("evaluate") == 2, "nothing was left"


def test_what_a_worker_refuses_is_the_users_error(tiny: Path, tones: Path, tmp_path: Path, cluster: str) -> None:
    spec = job(tiny, tones, tmp_path / "run", {"resources": {"workers": 2}}, fp16=True)
    finished = run("--config", write(spec, tmp_path), "-o", "json", cluster=cluster)
    assert finished.code == 2
    assert finished.error()["faults"] == [
        {
            "where": "training.fp16",
            "message": "needs a GPU, and this worker has none; leave it out",
            "value": True,
        }
    ]


def test_an_adapter_that_has_not_learned_fails_the_job(tiny: Path, tones: Path, tmp_path: Path, cluster: str) -> None:
    spec = job(tiny, tones, tmp_path / "run", lr=1e-45)  # so small that s * B @ A is rounded to zero
    finished = run("--config", write(spec, tmp_path), "-o", "json", cluster=cluster)
    assert finished.code == 10
    assert "32 of 32 adapted modules did not change in training" in finished.error()["error"]
    assert not (tmp_path / "run/manifest.json").exists()


def test_a_clip_that_vanishes_in_mid_training_is_named_and_checkpoints_stay(
    tiny: Path, tones: Path, tmp_path: Path, cluster: str
) -> None:
    shutil.copytree(tones, tmp_path / "data")
    again = {"data": {"keep_audio_gb": 0}}  # each epoch reads the files
    spec = job(tiny, tmp_path / "data", tmp_path / "run", again, epochs=40, save_steps=2, eval_steps=500)
    arguments = ("--config", write(spec, tmp_path), "-o", "json")
    process = start(*arguments, cluster=cluster)
    wait_until(lambda: bool(steps_of(tmp_path / "run", "checkpoint")), process)
    (tmp_path / "data/03.wav").unlink()
    stdout, stderr = process.communicate(timeout=200)
    finished = Finished(process.returncode, stdout, stderr, 0.0)
    assert finished.code == 15
    assert finished.error()["error"].startswith(f"{tmp_path}/data/03.wav: no such file; it was there when")
    assert list((tmp_path / "run/checkpoints").rglob("state.pt"))
