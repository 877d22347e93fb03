"""What ends a search early, and its schedulers, without a cluster: Ray Tune's own objects, and ours that it calls."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.cloudpickle import dumps, loads
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from jobs.search.explore import TIME, Watch, scheduler_of
from jobs.search.ledger import Ledger, trial_id
from jobs.search.sampler import SCORE, make_searcher
from jobs.search.trial import Result
from service.errors import InputLostError, StorageError
from service.spec.job import JobSpec
from service.storage import Storage
from service.trials import DEFAULTS, Evaluation


def search(**settings: Any) -> JobSpec:
    return JobSpec.model_validate({"kind": "search", "search": {"space": {"lora_r": [4, 8]}} | settings})


def ledger_of(spec: JobSpec, folder: Path, trials: int = 3) -> Ledger:
    ledger = Ledger(Storage(str(folder)), spec, {"wer": 0.6, "cer": 0.5})
    for number in range(trials):
        ledger.begin(number, DEFAULTS, {"lora_r": number + 1}, {})
    return ledger


def trial(number: int, **more: Any) -> Any:
    """A trial as Ray Tune hands it to callbacks."""
    return SimpleNamespace(config={"number": number}, trial_id=f"tune{number}", **more)


def tell(watch: Watch, number: int, **result: Any) -> None:
    score = result.pop("score", 0.5)
    evaluation = Evaluation(number=1, step=10, seed=42, wer=score, score=score, seconds=1.0)
    found = Result(score, result.pop("evaluation", 1), [evaluation], facts={"score": score}, **result)
    watch.on_trial_result(1, [], trial(number), {"result": found})


def test_results_are_kept_and_ends_are_told_apart(tmp_path: Path) -> None:
    ledger = ledger_of(search(), tmp_path)
    watch = Watch(search(), ledger)
    tell(watch, 0)
    tell(watch, 1, status="finished")
    tell(watch, 2, status="failed", cause="out of memory")
    last = {"result": Result(0.5, 2)}
    watch.on_trial_complete(1, [], trial(0, last_result=last))
    watch.close()
    assert [(row.status, row.cause) for row in ledger.trials] == [
        ("stopped", "asha: at 50%"), ("finished", None), ("failed", "out of memory"),
    ]  # fmt: skip
    assert not watch.stop_all()


def test_one_failure_too_many_ends_the_search_and_is_named(tmp_path: Path) -> None:
    spec = search(max_failures=1)
    ledger = ledger_of(spec, tmp_path)
    watch = Watch(spec, ledger)
    tell(watch, 2, status="failed", cause="first")
    assert (watch.reason, ledger.closed) == (None, False)
    tell(watch, 0, status="failed", cause="second")
    assert watch.reason == "too many trials have failed"
    assert watch.last_failure == "t000: second"
    assert ledger.closed, "no more trials are begun"
    assert make_searcher(spec, ledger).suggest("tune") == "FINISHED"
    assert not watch.stop_all(), "the others leave a checkpoint first"
    watch.close()


def test_what_would_end_all_trials_ends_the_search(tmp_path: Path) -> None:
    ledger = ledger_of(search(), tmp_path)
    watch = Watch(search(), ledger)
    error = InputLostError("a clip has gone")
    tell(watch, 0, status="interrupted", fatal=error)
    assert watch.fatal is error
    assert ledger.trials[0].status == "running", "it goes on when the clip is there again"
    watch.close()


def test_a_result_that_cannot_be_kept_ends_the_search_with_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_of(search(), tmp_path)
    watch = Watch(search(), ledger)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ledger.root, "write_text", full)
    tell(watch, 0)
    assert isinstance(watch.fatal, StorageError)
    assert "No space left" in str(watch.fatal)
    watch.close()


def test_budgets_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = search(hours=1.0)
    ledger = ledger_of(spec, tmp_path)
    ledger.before_s = 3590.0
    watch = Watch(spec, ledger)
    watch.stop_all()
    assert watch.reason is None
    monkeypatch.setattr("jobs.search.explore.time.monotonic", lambda: watch._began + 11)
    watch.stop_all()
    assert watch.reason == "search.hours, 1, are over"
    watch.close()


def test_gpu_hours_count_trials_that_still_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = search(gpu_hours=2.0)
    spec = spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus_per_worker": 1.0})})
    ledger = ledger_of(spec, tmp_path)
    watch = Watch(spec, ledger)
    tell(watch, 0)
    tell(watch, 1)
    began = watch._began
    monkeypatch.setattr("jobs.search.explore.time.monotonic", lambda: began + 3500)
    watch.stop_all()
    assert watch.reason is None
    monkeypatch.setattr("jobs.search.explore.time.monotonic", lambda: began + 3700)
    watch.stop_all()
    assert watch.reason == "search.gpu_hours, 2, are used up"
    watch.close()


def test_ray_tune_may_write_down_what_it_holds(tmp_path: Path) -> None:
    """It pickles its configuration at the start, with locks and threads in it."""
    ledger = ledger_of(search(), tmp_path)
    loads(dumps([Watch(search(), ledger), make_searcher(search(), ledger)]))


# Schedulers.


@dataclass(frozen=True)
class Row:
    """A trial as far as schedulers look at it."""

    trial_id: str


def decisions(spec: JobSpec, scores: list[list[float]]) -> list[list[str]]:
    """What a scheduler says to each result of trials that run side by side."""
    scheduler = scheduler_of(spec)
    controller: Any = SimpleNamespace(get_live_trials=list)
    trials = [Row(f"tune{number}") for number in range(len(scores))]
    for each in trials:
        scheduler.on_trial_add(controller, each)
    said: list[list[str]] = [[] for _ in trials]
    for turn in range(max(map(len, scores))):
        for number, each in enumerate(trials):
            if turn < len(scores[number]) and TrialScheduler.STOP not in said[number]:
                result = {TIME: turn + 1, SCORE: scores[number][turn], "training_iteration": turn + 1}
                said[number].append(scheduler.on_trial_result(controller, each, result))
    return said


GO, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def test_asha_keeps_the_best_at_each_rung_and_says_nothing_at_the_end() -> None:
    spec = search(evaluations=4, reduction=2)
    # The first one at a rung has nothing to be compared with.
    assert decisions(spec, [[0.3] * 4, [0.2] * 4, [0.5] * 4, [0.1] * 4]) == [
        4 * [GO], 4 * [GO], [STOP], 4 * [GO],
    ]  # fmt: skip


def test_median_ends_what_is_worse_than_the_others() -> None:
    spec = search(scheduler="median", evaluations=4)
    said = decisions(spec, [[0.3] * 3, [0.2] * 3, [0.25] * 3, [0.9] * 3])
    assert STOP in said[3]
    assert all(word == GO for row in (said[1], said[2]) for word in row)


@pytest.mark.parametrize("settings", [{"scheduler": "none"}, {"evaluations": 1}, {"evaluations": 2, "grace": 2}])
def test_where_nothing_can_be_ended_early_nothing_is(settings: dict[str, Any]) -> None:
    assert isinstance(scheduler_of(search(**settings)), FIFOScheduler)


def test_a_ledger_of_over_a_thousand_trials_keeps_their_order(tmp_path: Path) -> None:
    ledger = ledger_of(search(), tmp_path, trials=0)
    for number in (99, 100, 101, 999, 1000, 1001):
        ledger.begin(number, "random", {"lora_r": number}, {})
    again = ledger_of(search(), tmp_path, trials=0)
    assert list(again.entries) == [trial_id(number) for number in (99, 100, 101, 999, 1000, 1001)]
