"""A trial as Ray Tune sees it: each step waits for the next result."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ray import tune

from jobs.cluster import StopFlag
from jobs.search.ledger import trial_id
from jobs.search.runner import runner_for
from jobs.search.sampler import SCORE
from jobs.search.trial import Result, TrialPlan, results
from service.spec.job import JobSpec


class TrialActor(tune.Trainable):
    """The light driver of a trial. `stop` ends the training that is under way."""

    def setup(self, config: dict[str, Any], plan: TrialPlan | None = None, bell: Any = None) -> None:
        """See Trainable.

        Args:
            config: {"number": n}.
            plan: what all trials share.
            bell: the job's StopBell actor.
        """
        assert plan is not None
        spec = JobSpec.model_validate_json(plan.spec)
        self._evaluations = spec.search.evaluations
        trial = trial_id(config["number"])
        self._results: Generator[Result] = results(plan, trial, runner_for(spec), StopFlag(bell).is_set)

    def step(self) -> dict[str, Any]:
        """See Trainable."""
        result = next(self._results)
        ends = result.status != "running"
        told: dict[str, Any] = {"evaluation": result.evaluation, "result": result, "done": ends}
        # Schedulers judge by the first run, before its end; the sampler learns what a trial has come to.
        judged = 0 < result.evaluation < self._evaluations
        if result.score is not None and (result.status in ("finished", "stopped") or (judged and not ends)):
            told[SCORE] = result.score
        return told

    def cleanup(self) -> None:
        """See Trainable."""
        self._results.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """See Trainable: checkpoints are the engine's own."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See Trainable."""
