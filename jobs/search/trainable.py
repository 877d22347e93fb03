"""A trial as Ray Tune sees it: each step waits for the next result."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from ray import tune

from jobs.cluster.stop_bell import StopFlag
from jobs.search.ledger import trial_id
from jobs.search.runner import TrialRunner, runner_for
from jobs.search.sampler import SCORE
from jobs.search.shared.actor import InEngine
from jobs.search.trial import Result, TrialPlan, results
from service.spec.job import JobSpec


class TrialActor(tune.Trainable):
    """The light driver of a trial. `stop` ends the training that is under way."""

    def setup(
        self,
        config: dict[str, Any],
        plan: TrialPlan | None = None,
        bell: Any = None,
        log: Any = None,
        engines: Sequence[Any] = (),
    ) -> None:
        """See Trainable.

        Args:
            config: {"number": n}.
            plan: what all trials share.
            bell: the job's StopBell actor.
            log: the job's EventLog actor.
            engines: actors in which trials train together; empty: each trains on its own.
        """
        assert plan is not None
        self._plan, self._engines, self._stopping, self._log = plan, engines, StopFlag(bell), log
        self._spec = JobSpec.model_validate_json(plan.spec)
        self._evaluations = self._spec.search.evaluations
        self._results = self._begin(config["number"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """See Trainable: where trials train in engines, their drivers are used again."""
        self._results.close()
        self._results = self._begin(new_config["number"])
        return True

    def _begin(self, number: int) -> Generator[Result]:
        runner: TrialRunner = runner_for(self._spec)
        if self._engines:
            runner = InEngine(self._engines, number, self._spec.resources.max_failures)
        trial = trial_id(number)

        def advance(share: float) -> None:
            self._log.emit.remote({"event": "trial_step", "id": trial, "share": share})

        return results(self._plan, trial, runner, self._stopping.is_set, advance)

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
