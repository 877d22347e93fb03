"""SIGKILL at seeded moments: the job, or the same command again, ends at the very bits of a run left alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import job, prepared, read_lines, run_engine, saved_adapter
from gloo import train_in_processes
from planning import Faults

from service.artifacts import verify
from service.spec.job import JobSpec
from service.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STEPS = {1: 28, 2: 16, 3: 12}
"""Steps of the job by workers: 13 clips, 2 to a forward pass, 4 epochs; an epoch's last step leaves workers idle."""

IN_TRAINING = {
    "before a step": 9,
    "between gradients and optimizer": 9,
    "after the optimizer": 9,
    "in evaluation": 3,
    "after the adapter of a checkpoint": 5,
    "before the seal of a checkpoint": 4,
    "before the renaming of a checkpoint": 4,
    "before the adapter is published": 1,
}
"""How often each worker passes there; what concerns checkpoints, rank 0 alone."""

AFTERWARDS = (
    "in the check of the data",
    "before the merged model is saved",
    "before the merged model is renamed",
    "in the proof of the merged model",
    "before metrics.json",
    "before manifest.json",
)


@dataclass(frozen=True)
class Moment:
    """When who is killed."""

    point: str
    action: str
    count: int = 1
    rank: int | None = None
    workers: int = 1
    dora: bool = False

    def __str__(self) -> str:
        who = self.action if self.rank is None else f"{self.action} {self.rank}"
        return f"{who}, {self.point} {self.count}, {self.workers} workers, {'DoRA' if self.dora else 'LoRA'}"


def moments() -> list[Moment]:
    """Every point with every process that may die there, with counts and ranks drawn from one seed."""
    draw = random.Random(4)
    found = []
    for index, (point, most) in enumerate(IN_TRAINING.items()):
        for turn, action in enumerate(("kill this process", "kill the driver", "kill the controller")):
            workers = (index + turn) % 3 + 1
            alone = "checkpoint" in point or "published" in point
            rank = 0 if alone else draw.randrange(workers)
            found.append(Moment(point, action, draw.randint(1, most), rank, workers, draw.random() < 0.5))
    for point in AFTERWARDS:
        found.append(Moment(point, "kill this process", workers=draw.randint(1, 3), dora=draw.random() < 0.5))
    return found


MOMENTS = moments()


def spec_of(tiny: Path, tones: Path, root: Path, workers: int, dora: bool) -> JobSpec:
    sections = {
        "resources": {"workers": workers},
        "augment": {"speed": [0.9, 1.0, 1.1], "noise_prob": 0.5, "mask_time_prob": 0.05},
    }
    settings: dict[str, Any] = {"epochs": 4, "lora_dropout": 0.2, "use_dora": dora, "save_steps": 3, "eval_steps": 7}
    return job(tiny, tones, root, sections, **settings)


@pytest.fixture(scope="session")
def undisturbed(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The roots of runs that nobody disturbs, made by the engine without Ray, each when it is first asked for."""
    made: dict[tuple[int, bool], Path] = {}

    def root_of(workers: int, dora: bool) -> Path:
        if (workers, dora) not in made:
            spec = spec_of(tiny, tones, tmp_path_factory.mktemp("undisturbed") / "run", workers, dora)
            if workers == 1:
                run_engine(spec)
            else:
                (report,) = train_in_processes([prepared(spec)], workers)
                assert "error" not in report, report["traceback"]
            made[workers, dora] = Path(spec.root)
        return made[workers, dora]

    return root_of


@pytest.mark.parametrize(
    "moment",
    [pytest.param(one, id=str(one)) for one in MOMENTS],
)
def test_a_killed_job_ends_at_the_same_bits(
    moment: Moment, faults: Faults, undisturbed: Any, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec = spec_of(tiny, tones, tmp_path / "run", moment.workers, moment.dora)
    path = tmp_path / "spec.json"
    path.write_text(spec.to_json())
    arguments = ("--config", path, "-o", "json")

    faults.plan(moment.point, moment.action, moment.count, moment.rank)
    finished = faults.run(*arguments)
    assert faults.fired, finished.stderr
    driver_died = finished.code == -9
    assert driver_died == (moment.action == "kill the driver" or moment.point in AFTERWARDS[-2:])
    if driver_died:
        assert not (tmp_path / "run/manifest.json").exists()
        finished = faults.run(*arguments)
    result = finished.json()  # a worker or the controller that dies costs no second command

    expected = undisturbed(moment.workers, moment.dora)
    one, other = saved_adapter(tmp_path / "run/adapter"), saved_adapter(expected / "adapter")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("base", "tuned"):
        assert (tmp_path / f"run/evaluation/{name}.jsonl").read_bytes() == (
            expected / f"evaluation/{name}.jsonl"
        ).read_bytes()
    assert result["training"]["steps"] == STEPS[moment.workers]
    assert verify(Storage(str(tmp_path / "run"))).problems == []
    assert list((tmp_path / "run").rglob(".wj-*")) == []
    steps = [event["step"] for event in read_lines(tmp_path / "run/events.jsonl") if event["event"] == "step"]
    assert max(steps) == STEPS[moment.workers]
