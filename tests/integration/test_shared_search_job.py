"""A search whose trials train together, from spec to manifest.json on a local Ray: left alone, and killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import job, read_lines, run_engine, saved_adapter
from running import Finished, run, start, wait_until

from jobs.search.trial import job_of
from service.artifacts import verify
from service.spec.job import JobSpec
from service.storage import Storage
from service.trials import read_search

pytestmark = pytest.mark.slow

ROWS = 13
GRID = {
    "space": {"lora_r": [4, 8], "use_dora": [False, True]},
    "sampler": "grid",
    "scheduler": "none",
    "evaluations": 2,
}


@pytest.fixture(scope="module")
def spec_at(tiny: Path, tones: Path) -> Callable[..., JobSpec]:
    def make(folder: Path, epochs: int = 2, **search: Any) -> JobSpec:
        sections = {"resources": {"workers": 0}, "evaluation": {"metric": "loss", "max_new_tokens": 6, "bootstrap": 10}}
        spec = job(tiny, tones, folder / "root", sections, freeze_encoder=True, epochs=epochs, lora_dropout=0.2)
        return JobSpec.model_validate(spec.model_dump(mode="json") | {"kind": "search", "search": GRID | search})

    return make


def arguments(spec: JobSpec, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(spec.to_json())
    return ["--config", str(folder / "spec.json"), "-o", "json"]


def submit(spec: JobSpec, folder: Path) -> Finished:
    return run(*arguments(spec, folder))


def assert_each_is_its_configuration_alone(spec: JobSpec, folder: Path) -> None:
    for trial in read_search(Storage(spec.root)).trials[1:]:
        assert trial.status == "finished", trial.cause
        made = job_of(spec, trial.settings, ROWS)
        root = folder / f"alone-{trial.id}"
        alone = made.model_copy(update={"training": made.training.model_copy(update={"outdir": str(root)})})
        history = run_engine(alone)[0]["training"]["history"]
        assert [each.step for each in trial.evaluations] == [entry["step"] for entry in history]
        for each, entry in zip(trial.evaluations, history, strict=True):
            assert each.loss == pytest.approx(entry["loss"], rel=1e-4), trial.settings


def test_trials_that_train_together_are_their_configurations_alone(
    spec_at: Callable[..., JobSpec], tmp_path: Path
) -> None:
    spec = spec_at(tmp_path)
    finished = submit(spec, tmp_path)

    assert finished.code == 0, finished.stderr
    assert "trials train together, in" in finished.stderr
    assert "core_worker" not in finished.stderr, "no word of Ray's own"
    assert verify(Storage(spec.root)).problems == []
    assert len(read_search(Storage(spec.root)).trials) == 1 + 5, "the untuned model, the defaults and four points"
    assert_each_is_its_configuration_alone(spec, tmp_path)
    assert saved_adapter(Path(spec.root) / "adapter")


@pytest.mark.faults
def test_an_engine_that_is_killed_is_begun_again_and_its_trials_go_on(
    spec_at: Callable[..., JobSpec], tmp_path: Path
) -> None:
    import psutil

    spec = spec_at(tmp_path, epochs=10, space={"lora_r": [4, 8]})
    process = start(*arguments(spec, tmp_path))

    def engines() -> list[psutil.Process]:
        found = []
        for each in psutil.Process(process.pid).children(recursive=True):
            try:
                found += [each] if "EngineActor" in " ".join(each.cmdline()) else []
            except psutil.Error:
                continue
        return found

    def has_checkpoint() -> bool:
        return any(Path(spec.root).glob("search/trials/t*/checkpoints/checkpoint-*"))

    wait_until(lambda: bool(engines()) and has_checkpoint(), process)
    for engine in engines():
        os.kill(engine.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=280)

    assert process.returncode == 0, stderr
    starts = [
        event["resumed_from_step"]
        for trial in ("t000", "t001", "t002")
        for event in read_lines(Path(spec.root) / f"search/trials/{trial}/events.jsonl")
        if event["event"] == "model"
    ]
    assert any(starts), "at least one has gone on from a checkpoint"
    assert_each_is_its_configuration_alone(spec, tmp_path)


def test_a_search_that_cannot_share_says_why(spec_at: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = spec_at(tmp_path, space={"lora_r": [4], "freeze_encoder": [True, False]}, engine="shared")
    refused = submit(spec, tmp_path)

    assert refused.code == 2
    assert "search.engine" in refused.stderr
    assert "training.freeze_encoder is false" in refused.stderr
