"""Searches from spec to manifest.json on a local Ray: left alone, killed twice, with trials that fail, with workers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine import job, read_lines, run_engine, saved_adapter
from running import CLI, Finished, run, start, wait_until

from jobs.search.trial import job_of
from service.artifacts import read_manifest, verify
from service.spec.job import JobSpec
from service.storage import Storage
from service.trials import Search, Trial, read_search

pytestmark = pytest.mark.slow

ROWS = 13
GRID = {
    "space": {"lora_r": [4, 8], "use_dora": [False, True], "lora_alpha": {"times": "lora_r", "by": [4]}},
    "sampler": "grid",
    "scheduler": "none",
    "evaluations": 3,
}
LONG: dict[str, Any] = {"epochs": 12, "lora_dropout": 0.1}
"""Long enough for a trial to be caught under way."""


class Found:
    """What a search has left."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage = root, Storage(str(root))

    @property
    def table(self) -> Search:
        return read_search(self.storage)

    @property
    def trials(self) -> dict[str, Trial]:
        return {trial.id: trial for trial in self.table.trials[1:]}

    def scores(self) -> dict[str, Any]:
        """What a trial has measured, without the time that it took."""
        return {
            name: (trial.settings, trial.status, [(e.seed, e.step, e.wer, e.loss, e.score) for e in trial.evaluations])
            for name, trial in self.trials.items()
        }

    def starts(self, trial: str) -> list[int]:
        """The steps from which a trial's training was begun or gone on with."""
        path = self.root / f"search/trials/{trial}/events.jsonl"
        return [event["resumed_from_step"] for event in read_lines(path) if event["event"] == "model"]

    def adapter(self) -> dict[str, torch.Tensor]:
        return saved_adapter(self.root / "adapter")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def spec_at(tiny: Path, tones: Path) -> Callable[..., JobSpec]:
    def make(folder: Path, sections: dict[str, Any] | None = None, **search: Any) -> JobSpec:
        more = {"resources": {"workers": 0}, "evaluation": {"metric": "loss", "max_new_tokens": 6, "bootstrap": 10}}
        training = LONG | (sections or {}).pop("training", {})
        for name, values in (sections or {}).items():
            more[name] = more.get(name, {}) | values
        content = job(tiny, tones, folder / "root", more, **training).model_dump(mode="json")
        return JobSpec.model_validate(content | {"kind": "search", "search": search})

    return make


def submit(spec: JobSpec, folder: Path, *more: str) -> Finished:
    return run(*arguments(spec, folder), *more)


def arguments(spec: JobSpec, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(spec.to_json())
    return ["--config", str(folder / "spec.json"), "-o", "json"]


@pytest.fixture(scope="module")
def alone(spec_at: Callable[..., JobSpec], tmp_path_factory: pytest.TempPathFactory) -> tuple[JobSpec, Found, Finished]:
    """A grid of four points and the defaults, left alone; the best two are taken to the end."""
    folder = tmp_path_factory.mktemp("alone")
    spec = spec_at(folder, **GRID, top_k=2)
    return spec, Found(folder / "root"), submit(spec, folder)


def test_a_search_ends_as_a_train_job_does(alone: tuple[JobSpec, Found, Finished]) -> None:
    spec, found, finished = alone
    metrics = finished.json()
    assert verify(found.storage).problems == []
    manifest = read_manifest(found.storage)
    assert (manifest.kind, manifest.job_id, manifest.spec_sha256) == ("search", spec.job_id, spec.sha256)
    assert {"adapter/adapter_model.safetensors", "merged/model.safetensors", "search/trials.json"} <= {
        record.path for record in manifest.files
    }
    assert manifest.search == metrics["search"]
    assert manifest.wer["tuned"] == metrics["tuned"]["wer"]
    assert metrics["search"]["settings"] == found.trials[metrics["search"]["winner"]].settings


def test_the_untuned_model_the_defaults_and_every_point_are_in_the_table(
    alone: tuple[JobSpec, Found, Finished],
) -> None:
    _, found, finished = alone
    untuned, defaults, *others = found.table.trials
    assert (untuned.id, untuned.final) == ("untuned", finished.json()["base"]["wer"])
    assert untuned.score is not None
    assert (defaults.origin, defaults.settings) == (
        "defaults",
        {"lora_r": 16, "use_dora": False, "lora_alpha": 32},
    )
    assert [trial.settings for trial in others] == [
        {"lora_r": r, "use_dora": dora, "lora_alpha": 4 * r} for r in (4, 8) for dora in (False, True)
    ]
    assert all(trial.status == "finished" and trial.step == trial.steps for trial in (defaults, *others))
    assert len({trial.score for trial in others}) == 4


def test_each_trial_equals_its_configuration_run_alone(alone: tuple[JobSpec, Found, Finished], tmp_path: Path) -> None:
    spec, found, _ = alone
    trial = found.trials["t002"]
    made = job_of(spec, trial.settings, ROWS)
    result, _ = run_engine(at(made, tmp_path / "one"))
    assert [(e.step, e.loss) for e in trial.evaluations] == [
        (entry["step"], entry["loss"]) for entry in result["training"]["history"]
    ]


def test_the_winner_is_the_best_of_those_taken_to_the_end_and_its_spec_makes_it_again(
    alone: tuple[JobSpec, Found, Finished], tmp_path: Path
) -> None:
    _, found, finished = alone
    ranking = sorted(found.trials.values(), key=lambda trial: float(trial.score or 0))[:2]
    assert {trial.id for trial in found.trials.values() if trial.final is not None} == {t.id for t in ranking}
    assert found.table.winner == min(ranking, key=lambda trial: float(trial.final or 0)).id
    winner = JobSpec.model_validate_json((found.root / "search/winner.json").read_text())
    assert winner.kind == "train"
    result, _ = run_engine(at(winner, tmp_path / "again"))
    assert result["tuned"]["wer"] == finished.json()["tuned"]["wer"]
    assert same(found.adapter(), saved_adapter(tmp_path / "again/adapter"))
    (other,) = (trial.id for trial in ranking if trial.id != found.table.winner)
    assert [path.name for path in (found.root / "search/adapters").iterdir()] == [other]


def test_nothing_is_left_that_no_one_needs(alone: tuple[JobSpec, Found, Finished]) -> None:
    _, found, _ = alone
    left = {path.name for path in found.root.rglob("search/trials/*/*")}
    assert left <= {"trial.json", "events.jsonl", "tensorboard"}
    curve = [event["step"] for event in read_lines(found.root / "events.jsonl") if event["event"] == "step"]
    assert curve == sorted(set(curve)), "the winner's whole curve, each step once"
    assert curve[-1] == found.trials[str(found.table.winner)].steps


def test_a_finished_search_is_only_read(alone: tuple[JobSpec, Found, Finished], tmp_path: Path) -> None:
    spec, found, finished = alone
    before = {path: path.stat().st_mtime_ns for path in found.root.rglob("*")}
    assert submit(spec, tmp_path).json() == finished.json()
    assert {path: path.stat().st_mtime_ns for path in found.root.rglob("*")} == before


def test_the_table_is_shown(alone: tuple[JobSpec, Found, Finished]) -> None:
    _, found, _ = alone
    shown = run("trials", found.root, program=CLI)
    rows = [line.split() for line in shown.stdout.splitlines() if line.startswith((" t0", " untuned"))]
    assert len(rows) == 6
    order = sorted(found.table.trials, key=lambda trial: (float(trial.score or 0), trial.id))
    assert [row[0] for row in rows] == [trial.id for trial in order]
    assert "5 of 5 done" in shown.stdout
    assert run("trials", found.root, "-o", "json", program=CLI).json() == found.table.model_dump(mode="json")


@pytest.mark.faults
def test_a_search_that_was_killed_after_its_winner_was_found_ends_with_that_one(
    alone: tuple[JobSpec, Found, Finished], tmp_path: Path
) -> None:
    spec, undisturbed, finished = alone
    root = tmp_path / "root"
    shutil.copytree(undisturbed.root, root)
    for name in ("manifest.json", "metrics.json", "report.html", "stages/merge.json", "merged/model.safetensors"):
        (root / name).unlink()
    metrics = submit(at(spec, root), tmp_path).json()
    assert verify(Storage(str(root))).problems == []
    assert metrics["search"] == finished.json()["search"]
    assert metrics["tuned"] == finished.json()["tuned"]
    assert same(Found(root).adapter(), undisturbed.adapter())


def at(spec: JobSpec, root: Path) -> JobSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update={"outdir": str(root)})})


def caught(found: Found) -> bool:
    """Whether a trial is done, and another one is under way."""
    if not (found.root / "search/trials.json").exists():
        return False
    trials = list(found.trials.values())
    early = any(t.status == "running" and len(t.evaluations) == 1 for t in trials)  # far from its end
    return early and any(t.status == "finished" for t in trials)


def caught_under_way(spec_at: Callable[..., JobSpec], folder: Path) -> tuple[JobSpec, Found, subprocess.Popen[str]]:
    """The search of `alone`, begun anew in another folder, at such a moment."""
    spec, found = spec_at(folder, **GRID, top_k=2), Found(folder / "root")
    process = start(*arguments(spec, folder))
    wait_until(lambda: caught(found), process)
    return spec, found, process


@pytest.mark.faults
def test_a_search_that_is_killed_twice_ends_as_one_left_alone(
    alone: tuple[JobSpec, Found, Finished], spec_at: Callable[..., JobSpec], tmp_path: Path
) -> None:
    """First all of its processes, then those of its trials: nothing is run twice, and the adapter is the same."""
    _, undisturbed, _ = alone
    spec, found, process = caught_under_way(spec_at, tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    for each in (psutil.Process(process.pid), *children):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()
    done = [name for name, trial in found.trials.items() if trial.status == "finished"]
    assert not (found.root / "manifest.json").exists()

    process = start(*arguments(spec, tmp_path))
    kill_trials(process, found, done)
    stdout, stderr = process.communicate(timeout=280)
    assert process.returncode == 0, stderr
    assert verify(found.storage).problems == []
    assert found.scores() == undisturbed.scores()
    assert json.loads(stdout)["tuned"] == read_metrics(undisturbed)["tuned"]
    assert same(found.adapter(), undisturbed.adapter())
    for name in done:
        assert found.starts(name)[1:] in ([], [found.trials[name].steps]), "only taken to the end, if at all"
    again = [name for name in found.trials if len([s for s in found.starts(name) if s != found.trials[name].steps]) > 1]
    assert again, "those that were killed went on"
    for name in again:
        first, *later = found.starts(name)
        evaluated = [each.step for each in found.trials[name].evaluations]
        assert first == 0
        assert all(step in (0, *evaluated) for step in later), "from a checkpoint"


def read_metrics(found: Found) -> Any:
    return found.storage.read_json("metrics.json")


def kill_trials(process: subprocess.Popen[str], found: Found, before: list[str]) -> None:
    """Kill the processes of trials while one of them is under way; the driver lives on."""
    at = {name: len(trial.evaluations) for name, trial in found.trials.items()}

    def under_way() -> bool:
        moved = [t for t in found.trials.values() if t.id not in before and t.status == "running"]
        return any(at.get(trial.id, 0) < len(trial.evaluations) < GRID["evaluations"] for trial in moved)

    wait_until(under_way, process)
    trials = [each for each in psutil.Process(process.pid).children(recursive=True) if is_trial(each)]
    assert trials
    for each in trials:
        each.kill()


def is_trial(process: psutil.Process) -> bool:
    try:
        return "Trainable" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.faults
def test_failed_trials_are_told_and_too_many_end_the_search_which_goes_on_when_more_are_allowed(
    spec_at: Callable[..., JobSpec], tmp_path: Path
) -> None:
    space = {"lora_alpha": [2**31, 16], "lr": [1.0]}
    short = {"training": {"epochs": 1}}
    spec = spec_at(tmp_path, short, space=space, sampler="grid", scheduler="none", evaluations=1, max_failures=0)
    found = Found(tmp_path / "root")
    error = submit(spec, tmp_path).error()
    assert error["exit_code"] == 3
    assert "1 trial has failed (search.max_failures: 0); the last one: t001: training: the" in error["error"]
    assert not (found.root / "manifest.json").exists()
    metrics = submit(spec, tmp_path, "--set", "search.max_failures=1").json()
    by_id = {trial["id"]: trial for trial in metrics["search"]["trials"]}
    assert by_id["t001"]["status"] == "failed"
    assert "stopped before the optimizer step" in by_id["t001"]["cause"]
    assert metrics["search"]["winner"] != "t001"
    assert found.starts("t001") == [0], "what has failed is not run again"
    assert verify(found.storage).problems == []


@pytest.mark.jobs
def test_trials_in_workers_chosen_by_tpe_and_ended_by_asha(spec_at: Callable[..., JobSpec], tmp_path: Path) -> None:
    sections = {"resources": {"workers": 1}, "training": {"epochs": 3}}
    space = {"lora_r": [2, 4], "lr": {"loguniform": [1e-5, 1e-2]}, "use_dora": [True, False]}
    spec = spec_at(tmp_path, sections, space=space, trials=4, evaluations=3, reduction=2)
    metrics = submit(spec, tmp_path).json()
    found = Found(tmp_path / "root")
    assert verify(found.storage).problems == []
    assert [trial.origin for trial in found.trials.values()] == ["defaults", "tpe", "tpe", "tpe"]
    assert {trial.status for trial in found.trials.values()} <= {"finished", "stopped"}
    early = [trial for trial in found.trials.values() if trial.status == "stopped"]
    assert all(trial.cause == f"asha: at {trial.evaluations[-1].number / 3:.0%}" for trial in early)
    for trial in found.trials.values():
        made = job_of(spec, trial.settings, ROWS)
        result, _ = run_engine(at(made, tmp_path / trial.id))
        history = [(entry["step"], entry["loss"]) for entry in result["training"]["history"]]
        measured = [(each.step, each.loss) for each in trial.evaluations]
        assert measured == history[: len(measured)], "as its configuration run alone for as many steps"
    winner = found.trials[metrics["search"]["winner"]]
    assert winner.final == metrics["tuned"]["wer"]
    assert metrics["training"]["steps"] == winner.steps, "on the full schedule"
    assert metrics["search"]["settings_text"]


@pytest.mark.faults
def test_a_search_ends_when_its_time_is_over_and_ships_the_best_so_far(
    spec_at: Callable[..., JobSpec], tmp_path: Path
) -> None:
    sections = {"training": {"epochs": 600}}
    spec = spec_at(tmp_path, sections, **GRID | {"evaluations": 40}, hours=0.008, concurrent=1)
    metrics = submit(spec, tmp_path).json()
    found = Found(tmp_path / "root")
    assert metrics["search"]["ended"] == "search.hours, 0.008, are over"
    assert len(found.trials) < 5
    assert all(trial.status in ("finished", "stopped") for trial in found.trials.values())
    assert verify(found.storage).problems == []


@pytest.mark.faults
def test_a_search_that_is_stopped_leaves_checkpoints_and_goes_on(
    alone: tuple[JobSpec, Found, Finished], spec_at: Callable[..., JobSpec], tmp_path: Path
) -> None:
    _, undisturbed, _ = alone
    spec, found, process = caught_under_way(spec_at, tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 4, stderr
    assert "The same command goes on with the others" in stderr
    assert any(trial.status in ("pending", "running") for trial in found.trials.values())
    submit(spec, tmp_path).json()
    assert found.scores() == undisturbed.scores()
    assert same(found.adapter(), undisturbed.adapter())


@pytest.mark.faults
def test_repeats_and_a_longer_final_training(spec_at: Callable[..., JobSpec], tmp_path: Path) -> None:
    space = {"lora_r": [4]}
    sections = {"training": {"epochs": 2}}
    spec = spec_at(
        tmp_path, sections, space=space, sampler="grid", scheduler="median", repeats=2, evaluations=2, final_epochs=5
    )
    metrics = submit(spec, tmp_path).json()
    found = Found(tmp_path / "root")
    for trial in found.trials.values():
        assert len(trial.scores) == 2
        assert trial.score == pytest.approx(sum(trial.scores) / 2)
    assert metrics["training"]["steps"] == 5 * 7
    assert json.loads((found.root / "search/winner.json").read_text())["training"]["epochs"] == 5
