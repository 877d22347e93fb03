"""Where a search's points come from, as searchers of Ray Tune. A search that goes on begins with what its ledger holds.

Trial 0 is the defaults. The others come from the grid, from draws of a seeded generator, or from Optuna's TPE through
Ray Tune's own OptunaSearch. No configuration is tried twice.
"""

from __future__ import annotations

import itertools
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from jobs.search.here import Here
from jobs.search.ledger import Ledger
from jobs.search.ledger import trial_id as name_of
from service.spec.job import JobSpec
from service.spec.search import Dimension
from service.spec.space import Point, defaults, draw, grid, job_at, planned_trials, random_point
from service.spec.training import TrainingConfig
from service.trials import DEFAULTS

SCORE = "score"

_TRIES = 500
"""Draws in a row of points that were tried already, after which a space counts as exhausted."""


class Points(Here, Searcher):
    """Gives Ray Tune the number of the next trial; the ledger knows its point.

    Args:
        spec: the search.
        ledger: holds the trials that an earlier attempt has begun; these come first, in their order.
    """

    def __init__(self, spec: JobSpec, ledger: Ledger) -> None:
        super().__init__(metric=SCORE, mode="min")
        self._spec, self._ledger = spec, ledger
        self._next, self._planned = 0, planned_trials(spec)
        self._numbers: dict[str, int] = {}
        self._known: dict[str, TrainingConfig] = {}
        self._source = self._proposals()

    def suggest(self, trial_id: str) -> Any:
        """See Searcher: {"number": n}, or FINISHED."""
        number = self._next
        if number >= self._planned or self._ledger.closed:
            return Searcher.FINISHED
        if number == 0:
            self._ledger.begin(0, DEFAULTS, defaults(self._spec), {})
        elif (found := self._propose(trial_id, number)) is not None:
            self._ledger.begin(number, self._spec.search.sampler, *found)
        else:
            self._planned = self._ledger.planned = number  # the space has no more points
            return Searcher.FINISHED
        self._next += 1
        self._numbers[trial_id] = number
        return {"number": number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See Searcher."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See Searcher."""

    def save(self, checkpoint_path: str) -> None:
        """See Searcher: the ledger is what is gone on from."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """See Searcher."""

    def _propose(self, trial_id: str, number: int) -> tuple[Point, dict[str, Any]] | None:
        """The point of a trial and its sampler's own names for it; None: there is none left."""
        if kept := self._ledger.entries.get(name_of(number)):
            return kept.trial.settings, kept.params
        for _, point in zip(range(_TRIES + len(self._ledger.entries)), self._source, strict=False):
            if not self._tried(point):
                return point, {}
        return None

    def _proposals(self) -> Iterator[Point]:
        if self._spec.search.sampler == "grid":
            yield from grid(self._spec)
            return
        # Each draw is a function of its number, so that a search that goes on draws as one that was never stopped.
        yield from (random_point(self._spec, draw_number) for draw_number in itertools.count(1))

    def _tried(self, point: Point) -> bool:
        """Whether a trial has trained just so; settings whose condition does not hold are `training`'s own."""
        return job_at(self._spec, point).training in self._trainings().values()

    def _trainings(self) -> dict[str, TrainingConfig]:
        """What each trial trains with; a trial's point never changes."""
        for trial in self._ledger.trials[len(self._known) :]:
            self._known[trial.id] = job_at(self._spec, trial.settings).training
        return self._known


class Learner(Points):
    """Points by Optuna's TPE, which learns from the trials before."""

    def __init__(self, spec: JobSpec, ledger: Ledger) -> None:
        super().__init__(spec, ledger)
        logging.getLogger("ray.tune.search.optuna").setLevel(logging.ERROR)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that Optuna calls experimental
            sampler = optuna.samplers.TPESampler(
                seed=spec.search.seed,
                n_startup_trials=max(3, min(10, self._planned // 4)),
                multivariate=True,
                group=True,
                constant_liar=True,
            )
        known = [entry.params for entry in list(ledger.entries.values())[1:]]
        self._optuna = OptunaSearch(
            space=self._draw, sampler=sampler, metric=SCORE, mode="min", points_to_evaluate=known or None
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See Searcher."""
        if self._numbers[trial_id] and SCORE in result:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See Searcher."""
        if self._numbers[trial_id]:
            failed = error or not result or SCORE not in result
            self._optuna.on_trial_complete(trial_id, None if failed else result, error=failed)

    def _propose(self, trial_id: str, number: int) -> tuple[Point, dict[str, Any]] | None:
        known = name_of(number) in self._ledger.entries
        for turn in range(_TRIES):
            name = trial_id if known or turn == 0 else f"{trial_id}-{turn}"
            found = self._optuna.suggest(name)
            point, params = json.loads(found["point"]), {key: value for key, value in found.items() if key != "point"}
            if known or not self._tried(point):
                if name != trial_id:
                    self._optuna._ot_trials[trial_id] = self._optuna._ot_trials.pop(name)
                return point, params
            self._tell_again(name, point)
        return None

    def _tell_again(self, name: str, point: Point) -> None:
        """Answer a draw that repeats a trial with that trial's score, where there is one."""
        training = job_at(self._spec, point).training
        known = self._trainings()
        scores = [trial.score for trial in self._ledger.trials if known[trial.id] == training]
        score = next((score for score in scores if score is not None), None)
        self._optuna.on_trial_complete(name, None if score is None else {SCORE: score}, error=score is None)

    def _draw(self, trial: Any) -> dict[str, Any]:
        """A point in Optuna's define-by-run form; as JSON, since Ray takes a slash in a name for a level."""

        def choose(name: str, dimension: Dimension) -> Any:
            if dimension.uniform:
                return trial.suggest_float(name, *dimension.uniform)
            if dimension.loguniform:
                return trial.suggest_float(name, *dimension.loguniform, log=True)
            if dimension.randint:
                low, high = dimension.options[0], dimension.options[-1]
                return trial.suggest_int(name, low, high, step=dimension.step or 1)
            # Lists are no categories to Optuna: it gets the index.
            return dimension.options[trial.suggest_categorical(name, list(range(len(dimension.options))))]

        return {"point": json.dumps(draw(self._spec, choose))}


def make_searcher(spec: JobSpec, ledger: Ledger) -> Points:
    """The searcher of `search.sampler`."""
    return Learner(spec, ledger) if spec.search.sampler == "tpe" else Points(spec, ledger)
