"""A training is defined by `resources.workers` virtual ranks: fewer workers compute the same one, dropout included."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import events, job, prepared, run_engine, saved_adapter
from gloo import train_in_processes

from jobs.prepare import split_file
from jobs.train.loop import TrainTask, train
from jobs.train.session import LocalSession
from service.spec.job import JobSpec

pytestmark = pytest.mark.slow


def spec_of(tiny: Path, tones: Path, root: Path, workers: int, **settings: Any) -> JobSpec:
    # 13 rows: in the last step of an epoch some virtual ranks have no row, and so draw no random number.
    sections = {"resources": {"workers": workers, "min_workers": 1}, "engine": {"keep_checkpoints": 100}}
    return job(tiny, tones, root, sections, epochs=2, lora_dropout=0.3, save_steps=2, eval_steps=5, **settings)


def stopped(spec: JobSpec, step: int, root: Path) -> TrainTask:
    """The run as it was when it had kept that step's checkpoint."""
    shutil.copytree(spec.root, root)
    for path in (root / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    training = spec.training.model_copy(update={"outdir": str(root)})
    files = [str(root / split_file(name)) for name in ("train", "val")]
    return TrainTask(spec.model_copy(update={"training": training}), *files, root=str(root))


@pytest.fixture(scope="module")
def runs(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Roots and losses: 2 and 3 virtual ranks on 1 worker and on 2; each begun on one number and ended on the other."""
    folder = tmp_path_factory.mktemp("elastic")
    specs = {(ranks, workers): spec_of(tiny, tones, folder / f"{ranks}-{workers}", ranks) for ranks in (2, 3)
             for workers in (1, 2)}  # fmt: skip
    found: dict[str, Any] = {}
    for ranks in (2, 3):
        _, session = run_engine(specs[ranks, 1])
        found[f"{ranks} on 1"] = (Path(specs[ranks, 1].root), losses(session.events))
    grown = stopped(specs[3, 1], 2, folder / "grown")
    tasks = [prepared(specs[2, 2]), prepared(specs[3, 2]), grown]
    reports = train_in_processes(tasks, 2)
    for name, task, report in zip(("2 on 2", "3 on 2", "3 on 1, then 2"), tasks, reports, strict=True):
        assert "error" not in report, report.get("traceback")
        found[name] = (Path(task.root), losses(report["events"]))
    session = LocalSession()
    shrunk = stopped(specs[2, 2], 4, folder / "shrunk")
    train(shrunk, session)
    (model,) = events(session, "model")
    assert model["resumed_from_step"] == 4
    found["2 on 2, then 1"] = (Path(shrunk.root), losses(session.events))
    return found


def losses(said: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in said if event["event"] == "step"]


@pytest.mark.setting("resources.min_workers")
@pytest.mark.parametrize(
    ("one", "other", "passed"),
    [
        ("2 on 2", "2 on 1", 0),
        ("3 on 2", "3 on 1", 0),
        ("2 on 2", "2 on 2, then 1", 4),
        ("3 on 1", "3 on 1, then 2", 2),
    ],
)
def test_fewer_workers_compute_the_same_training(runs: dict[str, Any], one: str, other: str, passed: int) -> None:
    """What was dropped out of each clip is the same, else the losses would be apart by far more (see below)."""
    (root, whole), (other_root, rest) = runs[one], runs[other]
    assert len(whole) >= 6
    assert rest == pytest.approx(whole[passed:], rel=1e-5)
    last = max((root / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])).name
    found = [saved_adapter(each / "checkpoints" / last / "adapter") for each in (root, other_root)]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert float((tensor - found[1][name]).abs().max()) <= 2e-5, name
    states = [torch.load(each / "checkpoints" / last / "state.pt")["random"] for each in (root, other_root)]
    assert len(states[0]) == len(states[1]) == int(one[0])
    for first, second in zip(*states, strict=True):
        assert torch.equal(first["torch"], second["torch"]), "to the bit: the next dropout too is the same"


def test_other_random_numbers_are_seen_in_the_losses(
    runs: dict[str, Any], tiny: Path, tones: Path, tmp_path: Path
) -> None:
    """The same clips in each step from one virtual rank, and so from one sequence of random numbers."""
    _, session = run_engine(spec_of(tiny, tones, tmp_path / "run", 1, grad_accum=2))
    found, expected = losses(session.events), runs["2 on 1"][1]
    assert found[0] == pytest.approx(expected[0], rel=1e-5), "B = 0: what is dropped out does not show yet"
    assert max(abs(one / other - 1) for one, other in zip(found, expected, strict=True)) > 2e-4


def test_a_virtual_rank_draws_the_same_numbers_whoever_else_is_on_its_worker() -> None:
    from jobs.train.ranks import VirtualRanks

    def drawn(workers: int) -> dict[int, list[float]]:
        numbers: dict[int, list[float]] = {}
        for worker in range(workers):
            ranks = VirtualRanks(4, worker, workers)
            ranks.seed(7)
            for _ in range(3):
                for rank in ranks.mine:
                    with ranks.at_work(rank):
                        numbers.setdefault(rank, []).append(float(torch.rand(())))
        return numbers

    alone = drawn(4)
    assert len({tuple(each) for each in alone.values()}) == 4
    assert drawn(1) == drawn(2) == drawn(3) == alone
