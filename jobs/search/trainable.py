"""A trial as Ray Tune sees it: each step waits for the next result. One process runs many, one after the other."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ray import tune

from jobs.cluster import StopFlag
from jobs.search.ledger import trial_id
from jobs.search.runner import runner_for
from jobs.search.trial import Result, TrialPlan, results
from service.spec.job import JobSpec


class TrialActor(tune.Trainable):
    """The light driver of trials. `stop` and `reset` end the training that is under way."""

    def setup(self, config: dict[str, Any], plan: TrialPlan | None = None, bell: Any = None) -> None:
        """See Trainable.

        Args:
            config: {"number": n}.
            plan: what all trials share.
            bell: the job's StopBell actor.
        """
        assert plan is not None
        self._plan, self._flag = plan, StopFlag(bell)
        self._runner = runner_for(JobSpec.model_validate_json(plan.spec))
        self._begin(config)

    def step(self) -> dict[str, Any]:
        """See Trainable."""
        result = next(self._results)
        told: dict[str, Any] = {"evaluation": result.evaluation, "result": result, "done": result.status != "running"}
        if result.score is not None and result.status not in ("failed", "interrupted"):
            told["score"] = result.score
        return told

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See Trainable: another trial, in the same process."""
        self.cleanup()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """See Trainable."""
        self._results.close()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """See Trainable: checkpoints are the engine's own."""
        return {}

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See Trainable."""

    def _begin(self, config: dict[str, Any]) -> None:
        trial = trial_id(config["number"])
        self._results: Generator[Result] = results(self._plan, trial, self._runner, self._flag.is_set)
