"""A search under way: Ray Tune's samplers and schedulers over trials, the ledger kept, budgets and stops obeyed."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from jobs.cluster.errors import as_user_error
from jobs.cluster.placement import release_placement_groups
from jobs.cluster.resources import groups_at_once
from jobs.failures import GO_ON, explain
from jobs.job import Job
from jobs.search.here import Here
from jobs.search.ledger import Ledger, trial_id
from jobs.search.sampler import SCORE, make_searcher
from jobs.search.shared.actor import start_engines
from jobs.search.trainable import TrialActor
from jobs.search.trial import Result, TrialPlan
from service.errors import InfeasibleError, JobFailedError, WhisperJobsError
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.shared import TRIALS, is_shared, why_separate
from service.spec.space import planned_trials
from service.trials import ENDED

_POLL_S = 0.2
_LOOK_EVERY_S = 5.0
_PATIENCE_S = 600.0
"""How long trials that are to end may take for a step, an evaluation's batch and a checkpoint."""

_NO_ROOM = "resources: the cluster has no room for one trial"
DRIVER_MEMORY = 512 << 20
"""Bytes that a trial's driver is counted with where its workers have the CPUs."""

TIME = "evaluation"
"""What schedulers count by: evaluations, each the same share of its trial's schedule."""

Function = TypeVar("Function", bound=Callable[..., Any])


def trials_at_once(job: Job) -> int:
    """How many trials there are to be at once: `search.concurrent`, or as many as the cluster has room for now.

    Raises:
        InfeasibleError: there is room for none.
    """
    room = groups_at_once(job.resources)
    if not room:
        way_out = "lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
        raise InfeasibleError(f"{_NO_ROOM}; {way_out}")
    if is_shared(job.spec):
        return job.spec.search.concurrent or min(room * TRIALS, planned_trials(job.spec))
    asked = job.spec.search.concurrent or room
    if asked > room:
        text = f"the cluster has room for {room} of {asked} trials now; the others wait for more"
        job.events.emit({"event": "notice", "text": text})
    return asked


def explore(job: Job, ledger: Ledger, plan: TrialPlan, at_once: int) -> str:
    """Run trials until all are done, or a budget is used up; returns why no more were begun.

    Raises:
        StoppedError: the user asked for it. Every running trial has left a checkpoint.
        JobFailedError: too many trials have failed.
        WhisperJobsError: what would end every trial.
    """
    watch = Watch(job.spec, ledger)
    ray.get(job.events.bell.reset.remote())
    scratches = tempfile.TemporaryDirectory(prefix="whisper-jobs-tune-")
    with scratches as scratch, _engines(job, ledger, plan, at_once) as engines:
        tuner = _tuner(job, ledger, plan, at_once, watch, scratch, engines)
        ended: list[BaseException] = []

        def fit() -> None:
            try:
                tuner.fit()
            except BaseException as error:  # noqa: BLE001  # raised in the main thread
                ended.append(error)

        # Beside the main thread: in it Ray Tune takes the signals for itself.
        thread = threading.Thread(target=fit, daemon=True, name="tune")
        thread.start()
        _follow(job, ledger, watch, thread)
    watch.close()
    release_placement_groups()
    ray.get(job.events.bell.reset.remote())
    if job.signals.asked:
        done = sum(trial.status in ENDED for trial in ledger.trials)
        raise job.signals.error(f"stopped with {counted(done, 'trial')} done. The same command goes on with the others")
    if watch.fatal:
        raise watch.fatal
    if ended:
        raise as_user_error(ended[0]) from ended[0]
    if watch.last_failure:
        limit = job.spec.search.max_failures
        raise JobFailedError(
            f"search: {counted(ledger.failures, 'trial has', 'trials have')} failed (search.max_failures: {limit}); "
            f"the last one: {watch.last_failure}"
        )
    for trial in ledger.trials:
        if trial.status not in ENDED:
            ledger.end(trial.id, "stopped", watch.reason or "the search ended")
    ledger.forget_losers()
    if not ledger.ranking():
        why = f"no trial was evaluated ({watch.reason})" if watch.reason else "all trials have failed"
        raise JobFailedError(f"search: {why}; give it more time, or other settings, and another outdir or --overwrite")
    return watch.reason or "all trials are done"


def _follow(job: Job, ledger: Ledger, watch: Watch, thread: threading.Thread) -> None:
    """Wait for Ray Tune's end, and see meanwhile to what may end the search early."""
    rung, looked, roomy = False, time.monotonic(), time.monotonic()
    while thread.is_alive():
        thread.join(_POLL_S)
        job.signals.check_watched()
        ledger.seconds = ledger.before_s + watch.elapsed_s
        if job.signals.asked:
            watch.end("the user asked for it")
        if watch.reason and not rung:
            rung = True
            text = f"ending the search: {watch.reason}; running trials leave a checkpoint"
            job.events.emit({"event": "notice", "text": text})
            job.events.bell.ring.remote()
        if time.monotonic() - looked > _LOOK_EVERY_S:
            looked = time.monotonic()
            release_placement_groups()
            roomy = looked if groups_at_once(job.resources) else roomy
            if looked - roomy > job.spec.resources.wait_s:
                error = InfeasibleError(f"{_NO_ROOM}, for {looked - roomy:.0f} s (resources.wait_s). {GO_ON}")
                watch.end("there is no room for a trial any more", error, patience_s=0)


def _kept(method: Function) -> Function:
    """What goes wrong in a callback of Ray Tune's ends the search; Ray Tune would tell it in words of its own."""

    @functools.wraps(method)
    def call(self: Watch, *arguments: Any, **named: Any) -> None:
        try:
            method(self, *arguments, **named)
        except Exception as error:  # noqa: BLE001  # kept, and raised by the search
            self.end("its results cannot be kept", explain(error))

    return call  # type: ignore[return-value]


class Watch(Here, tune.Stopper, tune.Callback):
    """Sees each result: keeps the ledger, forgets losers' checkpoints, and ends the search where a budget is used up.

    Its methods are called by Ray Tune, in its thread.
    """

    def __init__(self, spec: JobSpec, ledger: Ledger) -> None:
        self._spec, self._ledger = spec, ledger
        self._began = time.monotonic()
        self._ended: float | None = None
        self._patience_s = _PATIENCE_S
        self._heard: dict[str, float] = {}
        """When each trial that runs was heard of last."""
        self._cleaner = ThreadPoolExecutor(1, thread_name_prefix="forget")
        self.reason: str | None = None
        """Why the search is to end early."""
        self.fatal: WhisperJobsError | None = None
        self.last_failure: str | None = None
        """The failure that was one too many."""

    @property
    def elapsed_s(self) -> float:
        """Seconds of this attempt."""
        return time.monotonic() - self._began

    def end(self, reason: str, error: WhisperJobsError | None = None, patience_s: float = _PATIENCE_S) -> None:
        """Begin no more trials, and end those that run; with an error, the job with it.

        Args:
            reason: why.
            error: what the job ends with.
            patience_s: how long trials may take to end by themselves.
        """
        self._patience_s = min(self._patience_s, patience_s)
        self.fatal = self.fatal or error
        self.reason = self.reason or reason
        self._ended = self._ended or time.monotonic()
        self._ledger.closed = True

    def close(self) -> None:
        """Wait for what is still being removed."""
        self._cleaner.shutdown(wait=True)

    # A stopper of Ray Tune's.

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """See Stopper: single trials are the scheduler's affair."""
        return False

    def stop_all(self) -> bool:
        """See Stopper. Trials that are to end do so by themselves, with a checkpoint: Ray Tune would give them 10 s."""
        search = self._spec.search
        if search.hours is not None and self._ledger.before_s + self.elapsed_s >= search.hours * 3600:
            self.end(f"search.hours, {search.hours:g}, are over")
        if search.gpu_hours is not None and self._ledger.gpu_hours + self._running_gpu_hours() >= search.gpu_hours:
            self.end(f"search.gpu_hours, {search.gpu_hours:g}, are used up")
        return self._ended is not None and time.monotonic() - self._ended > self._patience_s

    def _running_gpu_hours(self) -> float:
        """Of running trials since each was heard of last."""
        now = time.monotonic()
        return sum(now - heard for heard in self._heard.values()) * self._ledger.gpus / 3600

    # Callbacks of Ray Tune's.

    @_kept
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Callback."""
        found: Result = result["result"]
        name = trial_id(trial.config["number"])
        self._heard[name] = time.monotonic()
        self._ledger.add(name, found.entries, **found.facts)
        if found.status != "running":
            self._heard.pop(name)
        if found.fatal:
            self.end("what has ended this trial would end the others too", found.fatal)
        elif found.status in ENDED:
            self._end(name, found.status, found.cause)

    @_kept
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback: where its last result was none that ends it, the scheduler has ended it."""
        name = trial_id(trial.config["number"])
        self._heard.pop(name, None)
        last = (trial.last_result or {}).get("result")
        if last is None or last.status != "running" or self.reason:
            return
        share = last.evaluation / self._spec.search.evaluations
        self._end(name, "stopped", f"{self._spec.search.scheduler}: at {share:.0%}")

    @_kept
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback: its process has died more often than `resources.max_failures` allows."""
        name = trial_id(trial.config["number"])
        self._heard.pop(name, None)
        cause = "its process ended"
        if kept := trial.pickled_error_file:  # Ray Tune's own reading of it looks at the copy, which comes later
            cause = str(as_user_error(pickle.loads(Path(kept).read_bytes())))
        self._end(name, "failed", cause.removesuffix(GO_ON).strip())

    def _end(self, name: str, status: Any, cause: str | None) -> None:
        self._ledger.end(name, status, cause)
        if status == "failed" and self._ledger.failures > self._spec.search.max_failures:
            self.last_failure = self.last_failure or f"{name}: {cause}"
            self.end("too many trials have failed")
        self._cleaner.submit(self._ledger.forget_losers)


def scheduler_of(spec: JobSpec) -> TrialScheduler:
    """Ray Tune's scheduler of `search.scheduler`. Its last word is before a trial's last evaluation."""
    search = spec.search
    common: dict[str, Any] = {"time_attr": TIME, "metric": SCORE, "mode": "min", "grace_period": search.grace}
    if search.grace >= search.evaluations or search.scheduler == "none":
        return FIFOScheduler()
    if search.scheduler == "asha":
        return ASHAScheduler(
            **common, max_t=search.evaluations - 1, reduction_factor=search.reduction, stop_last_trials=False
        )
    # It would pause trials for others to catch up; here each keeps its place.
    return MedianStoppingRule(**common, min_time_slice=float("inf"))


@contextlib.contextmanager
def _engines(job: Job, ledger: Ledger, plan: TrialPlan, at_once: int) -> Iterator[list[Any]]:
    """The engines in which the trials train together, while the search lasts; none where each trains on its own."""
    at_once_words = f"{counted(at_once, 'trial')} at once"
    if not is_shared(job.spec):
        workers = job.spec.resources.workers
        how = f"{counted(workers, 'worker')} each" if workers else "each in a process of its own"
        job.events.emit({"event": "notice", "text": f"{at_once_words}, {how}"})
        if job.spec.search.engine == "auto":
            reason = why_separate(job.spec)[0]
            job.events.emit({"event": "notice", "text": f"trials train separately: {reason}"})
        yield []
        return
    count = max(1, min(groups_at_once(job.resources), at_once))
    ledger.share = count / at_once
    text = f"trials train together, in {count} process{'es' * (count > 1)} over one base model each"
    job.events.emit({"event": "notice", "text": f"{at_once_words}: {text}"})
    engines = start_engines(job.spec, plan.revision, job.events.bell, count, job.resources.per_worker())
    try:
        yield engines
    finally:
        for engine in engines:
            ray.kill(engine.actor)


def _tuner(
    job: Job, ledger: Ledger, plan: TrialPlan, at_once: int, watch: Watch, scratch: str, engines: list[Any]
) -> tune.Tuner:
    _quieten()
    spec = job.spec
    bundle: dict[str, float] = {"memory": float(DRIVER_MEMORY)}
    if not spec.resources.workers and not engines:
        bundle = job.resources.per_worker()
    actor = tune.with_parameters(TrialActor, plan=plan, bell=job.events.bell, log=job.events.log, engines=engines)
    return tune.Tuner(
        tune.with_resources(actor, tune.PlacementGroupFactory([bundle])),
        tune_config=tune.TuneConfig(
            search_alg=make_searcher(spec, ledger),
            scheduler=scheduler_of(spec),
            num_samples=-1,  # the searcher says when there are no more
            max_concurrent_trials=at_once,
            # A process of its own for each: what one has left in memory, or hanging, ends with it. Of those that train
            # in engines a process holds next to nothing.
            reuse_actors=bool(engines),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=scratch,  # the ledger is what a search goes on from
            stop=watch,
            callbacks=[watch],
            failure_config=tune.FailureConfig(max_failures=spec.resources.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _quieten() -> None:
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that has failed has no score
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # they are in the table
    os.environ["TUNE_WARN_THRESHOLD_S"] = "60"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
