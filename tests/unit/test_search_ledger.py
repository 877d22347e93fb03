"""The ledger of a search and the samplers that go on from it, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from jobs.search.importance import importance_of
from jobs.search.ledger import Ledger, folder_of, trial_id
from jobs.search.sampler import SCORE, Points, make_searcher
from service.spec.job import JobSpec
from service.spec.space import Point, defaults, job_at, random_point
from service.storage import Storage
from service.trials import DEFAULTS, Evaluation, Trial, read_search

SPACE = {
    "lora_r": [4, 8, 16, 32],
    "lora_alpha": {"times": "lora_r", "by": [1, 2]},
    "use_dora": [True, False],
    "lr": {"loguniform": [1e-5, 1e-3]},
    "lora_dropout": {"choice": [0.1, 0.2], "when": {"use_dora": False}},
    "lora_target_modules": [["q_proj"], ["q_proj", "v_proj"]],
}


def search(space: Any = None, training: Any = None, **settings: Any) -> JobSpec:
    content = {"kind": "search", "search": {"space": space or SPACE} | settings, "training": training or {}}
    return JobSpec.model_validate(content)


@pytest.fixture
def open_ledger(tmp_path: Path) -> Callable[[JobSpec], Ledger]:
    def make(spec: JobSpec) -> Ledger:
        return Ledger(Storage(str(tmp_path)), spec, {"wer": 0.6, "cer": 0.5})

    return make


def evaluation(score: float, number: int = 1, seed: int = 42) -> Evaluation:
    return Evaluation(number=number, step=10 * number, seed=seed, wer=score, score=score, seconds=1.0)


def score_of(point: Point) -> float:
    """A score that a learner can lower: less for larger ranks, DoRA, and rates near 1e-4."""
    training = job_at(search(), point).training
    return 1 / training.lora_r + 0.2 * (not training.use_dora) + abs(training.lr - 1e-4) * 100


def play(searcher: Points, ledger: Ledger, count: int) -> list[Point]:
    """Let a searcher propose trials, one after the other, and answer each; returns their points."""
    points = []
    for turn in range(count):
        name = f"tune-{len(points)}-{turn}"
        proposed = searcher.suggest(name)
        if proposed == Searcher.FINISHED:
            break
        trial = trial_id(proposed["number"])
        point = ledger.entries[trial].trial.settings
        ledger.add(trial, [evaluation(score_of(point))], score=score_of(point))
        ledger.end(trial, "finished")
        searcher.on_trial_result(name, {SCORE: score_of(point), "training_iteration": 1})
        searcher.on_trial_complete(name, {SCORE: score_of(point), "training_iteration": 1})
        points.append(point)
    return points


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_defaults_come_first_and_no_configuration_twice(
    sampler: str, open_ledger: Callable[[JobSpec], Ledger]
) -> None:
    spec = search(sampler=sampler, trials=25)
    ledger = open_ledger(spec)
    points = play(make_searcher(spec, ledger), ledger, 100)
    assert points[0] == defaults(spec)
    assert len(points) == 25
    trainings = [job_at(spec, point).training for point in points]
    assert all(one != other for index, one in enumerate(trainings) for other in trainings[:index])
    assert [trial.origin for trial in ledger.trials] == [DEFAULTS] + 24 * [sampler]
    assert {len(point) for point in points[1:]} == {5, 6}, "the condition holds for some"


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_small_space_is_tried_whole_and_then_ends(sampler: str, open_ledger: Callable[[JobSpec], Ledger]) -> None:
    spec = search({"lora_r": [16, 8], "use_dora": [True, False]}, sampler=sampler)
    ledger = open_ledger(spec)
    points = play(make_searcher(spec, ledger), ledger, 50)
    assert len(points) == 4
    assert ledger.table().planned == 4
    assert {(p["lora_r"], p["use_dora"]) for p in points} == {(16, True), (16, False), (8, True), (8, False)}


def test_random_points_are_draws_by_number(open_ledger: Callable[[JobSpec], Ledger]) -> None:
    spec = search(sampler="random", trials=6, seed=7)
    ledger = open_ledger(spec)
    points = play(make_searcher(spec, ledger), ledger, 100)
    assert points[1:] == [random_point(spec, number) for number in range(1, 6)]


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
@pytest.mark.parametrize("killed_after", [0, 1, 2, 5])
def test_a_search_that_goes_on_proposes_first_what_it_had_begun(
    sampler: str, killed_after: int, open_ledger: Callable[[JobSpec], Ledger]
) -> None:
    space = {name: SPACE[name] for name in ("lora_r", "lora_alpha", "use_dora")}
    spec = search(space, sampler=sampler, trials=None if sampler == "grid" else 12)
    ledger = open_ledger(spec)
    play(make_searcher(spec, ledger), ledger, killed_after)
    make_searcher(spec, ledger)  # one that never came to propose anything
    again = open_ledger(spec)
    assert again.entries == ledger.entries
    begun = [trial.settings for trial in again.trials]
    points = play(make_searcher(spec, again), again, 100)
    assert points[: len(begun)] == begun
    assert len(points) == (16 if sampler == "grid" else 12)
    trainings = [job_at(spec, point).training for point in points]
    assert all(one != other for index, one in enumerate(trainings) for other in trainings[:index])


@pytest.mark.parametrize("killed_after", [1, 4, 9])
def test_a_random_search_that_was_killed_draws_as_one_left_alone(killed_after: int, tmp_path: Path) -> None:
    spec = search(sampler="random", trials=10)
    alone, killed, resumed = (
        Ledger(Storage(str(tmp_path / name)), spec, {"wer": 1.0, "cer": 1.0}) for name in ("one", "two", "two")
    )
    expected = play(make_searcher(spec, alone), alone, 100)
    play(make_searcher(spec, killed), killed, killed_after)
    resumed = Ledger(Storage(str(tmp_path / "two")), spec, {"wer": 1.0, "cer": 1.0})
    assert play(make_searcher(spec, resumed), resumed, 100) == expected


def test_tpe_learns(tmp_path: Path) -> None:
    """Its later trials are better than its first ones, and than those of a random search, in most of several tries."""
    wins = 0
    for seed in range(5):
        means = {}
        for sampler in ("tpe", "random"):
            spec = search(sampler=sampler, trials=40, seed=seed)
            ledger = Ledger(Storage(str(tmp_path / f"{sampler}{seed}")), spec, {"wer": 1.0, "cer": 1.0})
            points = play(make_searcher(spec, ledger), ledger, 100)
            means[sampler] = sum(map(score_of, points[20:])) / 20
        wins += means["tpe"] < means["random"]
    assert wins >= 4


def test_a_trial_that_has_failed_is_told_to_tpe_as_failed(open_ledger: Callable[[JobSpec], Ledger]) -> None:
    spec = search(sampler="tpe", trials=5)
    ledger = open_ledger(spec)
    searcher = make_searcher(spec, ledger)
    for number in range(3):
        searcher.suggest(f"t{number}")
    searcher.on_trial_complete("t0", {SCORE: 0.5, "training_iteration": 1})
    searcher.on_trial_complete("t1", {"training_iteration": 1})
    searcher.on_trial_complete("t2", error=True)
    states = [trial.state.name for trial in searcher._optuna._ot_study.trials]  # type: ignore[attr-defined]
    assert states == ["FAIL", "FAIL"]


# The ledger.


def test_the_record_is_there_before_the_trial_and_survives(open_ledger: Callable[[JobSpec], Ledger]) -> None:
    ledger = open_ledger(search())
    ledger.begin(0, DEFAULTS, {"lora_r": 16}, {})
    ledger.begin(1, "tpe", {"lora_r": 8}, {"lora_r": 1})
    assert [trial.status for trial in open_ledger(search()).trials] == ["pending", "pending"]
    ledger.add("t001", [evaluation(0.4, 1), evaluation(0.3, 2)], score=0.3, steps=40)
    ledger.add("t001", [evaluation(0.4, 1), evaluation(0.3, 2)], score=0.3)
    ledger.begin(1, "tpe", {"lora_r": 99}, {})
    again = open_ledger(search())
    assert again.entries["t001"].params == {"lora_r": 1}
    row = again.trials[1]
    assert (row.status, row.score, row.steps, len(row.evaluations), row.settings) == (
        "running",
        0.3,
        40,
        2,
        {"lora_r": 8},
    )


def test_what_has_ended_stays_ended(open_ledger: Callable[[JobSpec], Ledger]) -> None:
    ledger = open_ledger(search())
    ledger.begin(0, DEFAULTS, {}, {})
    ledger.end("t000", "stopped", "asha: at 25%")
    ledger.end("t000", "failed", "later")
    assert (ledger.trials[0].status, ledger.trials[0].cause) == ("stopped", "asha: at 25%")


def test_the_table_has_the_untuned_model_first(open_ledger: Callable[[JobSpec], Ledger], tmp_path: Path) -> None:
    ledger = open_ledger(search())
    ledger.begin(0, DEFAULTS, {"lora_r": 16}, {})
    table = read_search(Storage(str(tmp_path)))
    assert [(trial.id, trial.score) for trial in table.trials] == [("untuned", 0.6), ("t000", None)]
    assert (table.metric, table.planned, table.winner) == ("wer", 16, None)


def test_the_best_comes_first_and_of_equals_the_defaults(open_ledger: Callable[[JobSpec], Ledger]) -> None:
    ledger = open_ledger(search())
    for number, (score, size) in enumerate([(0.3, 9), (0.3, 5), (0.2, 9), (0.2, 5), (0.1, 1), (None, 1)]):
        ledger.begin(number, DEFAULTS if number == 0 else "tpe", {"lora_r": number + 1}, {})
        ledger.add(trial_id(number), [], score=score, trainable_parameters=size)
    ledger.end("t004", "failed", "out of memory")
    assert [trial.id for trial in ledger.ranking()] == ["t003", "t002", "t000", "t001"]
    assert ledger.failures == 1


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, {"t002", "t004"}), ({"top_k": 2}, {"t001", "t002", "t004"}), ({"final_epochs": 9}, {"t004"})],
)
def test_losers_checkpoints_are_removed_and_others_stay(
    settings: dict[str, Any], kept: set[str], open_ledger: Callable[[JobSpec], Ledger], tmp_path: Path
) -> None:
    ledger = open_ledger(search(**settings))
    for number, score in enumerate([0.5, 0.3, 0.2, 0.1, 0.05]):
        name = trial_id(number)
        ledger.begin(number, "tpe", {"lora_r": number + 1}, {})
        (tmp_path / folder_of(name) / "checkpoints/checkpoint-3").mkdir(parents=True)
        ledger.add(name, [], score=score)
        if number < 4:
            ledger.end(name, "failed" if number == 3 else "stopped")
    ledger.forget_losers()
    there = {path.parent.name for path in tmp_path.rglob("checkpoints") if any(path.iterdir())}
    assert there == kept


def test_gpu_hours_are_seconds_by_gpus(open_ledger: Callable[[JobSpec], Ledger]) -> None:
    spec = search()
    resources = spec.resources.model_copy(update={"workers": 4, "gpus_per_worker": 0.5})
    ledger = open_ledger(spec.model_copy(update={"resources": resources}))
    for number in range(2):
        ledger.begin(number, "tpe", {}, {})
        ledger.add(trial_id(number), [], seconds=1800.0)
    assert ledger.gpu_hours == 2.0


def test_each_change_is_told_once(open_ledger: Callable[[JobSpec], Ledger]) -> None:
    told: list[tuple[str, str]] = []
    ledger = open_ledger(search())
    ledger.tell = lambda trial, table: told.append((trial.id, trial.status))
    ledger.begin(0, DEFAULTS, {}, {})
    ledger.add("t000", [evaluation(0.5)], score=0.5)
    ledger.add("t000", [evaluation(0.5)], score=0.5)
    ledger.end("t000", "finished")
    ledger.end("t000", "finished")
    assert told == [("t000", "pending"), ("t000", "running"), ("t000", "finished")]


# Importance.


def trials_of(points: list[Point], scores: list[float]) -> list[Trial]:
    return [
        Trial(id=f"t{n:03}", origin="tpe", settings=point, status="finished", score=score)
        for n, (point, score) in enumerate(zip(points, scores, strict=True))
    ]


def test_the_setting_that_decides_is_the_most_important() -> None:
    spec = search({"lora_r": [4, 8, 16], "use_dora": [True, False], "lr": {"loguniform": [1e-5, 1e-2]}})
    points = [random_point(spec, number) for number in range(60)]
    for name, score in {
        "use_dora": lambda p: 0.5 - 0.4 * p["use_dora"] + 1e-6 * (1e7 * p["lr"] % 1),
        "lr": lambda p: abs(p["lr"] - 3e-4),
    }.items():
        found = importance_of(trials_of(points, [score(point) for point in points]))
        assert next(iter(found)) == name, found
        assert sum(found.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("count", "scores"), [(3, [0.1, 0.2, 0.3]), (6, 6 * [0.5])])
def test_too_little_says_nothing_of_importance(count: int, scores: list[float]) -> None:
    points = [{"lora_r": 4 + number} for number in range(count)]
    assert importance_of(trials_of(points, scores)) == {}


def test_settings_that_some_trials_lack_and_lists_do_no_harm() -> None:
    spec = search()
    points = [random_point(spec, number) for number in range(20)]
    found = importance_of(trials_of(points, [score_of(point) for point in points]))
    assert set(found) == {"lora_r", "lora_alpha", "use_dora", "lr", "lora_target_modules"}
    assert json.loads(json.dumps(found)) == found
