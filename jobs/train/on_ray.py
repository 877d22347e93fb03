"""The training engine in Ray Train workers; a group that loses a worker is started again from the last checkpoint."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from rich.markup import escape

from jobs.cluster import DEATHS, Resources, StopFlag, as_user_error, release_placement_groups, root_cause
from jobs.failures import GO_ON, explain
from service.artifacts import CHECKPOINTS
from service.errors import (
    Fault,
    HungError,
    InputError,
    JobFailedError,
    NotFoundError,
    StoppedError,
    WhisperJobsError,
    WorkerLostError,
)
from service.spec.job import JobSpec
from service.storage import Storage

if TYPE_CHECKING:
    from jobs.job import Job

_POLL_S = 0.2


class RaySession:
    """A worker of Ray Train, as the engine sees it.

    Args:
        log: the job's EventLog actor.
        bell: its StopBell actor.
    """

    def __init__(self, log: Any, bell: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self._log = log
        self._stop = StopFlag(bell)

    def emit(self, event: dict[str, Any]) -> None:
        """See Session."""
        if self.rank == 0:
            self._log.emit.remote(event)

    def stopping(self) -> bool:
        """See Session."""
        return self._stop.is_set()


def train_on_ray(job: Job, revision: str | None) -> dict[str, Any]:
    """Run the engine in a group of workers; returns what `jobs.train.loop.train` returns.

    A worker that dies costs the steps since the last checkpoint: the group is started again, `resources.max_failures`
    times at most. Ray Train's own retries would also repeat what fails in the same way each time.

    Raises:
        WhisperJobsError: as a worker raised it.
        WorkerLostError: workers died too often.
        HungError: a worker gave no sign of life.
        StoppedError: the user asked for it; a checkpoint is kept.
    """
    config = {"spec": job.spec.to_json(), "root": job.root.path(), "revision": revision}
    limit, failures, resources = job.spec.resources.max_failures, 0, job.resources
    while True:
        try:
            _fit(job, _trainer(job, config, resources))
            return dict(ray.get(job.events.log.result.remote()))
        except StoppedError as error:
            raise job.signals.error(str(error)) from error
        except WorkerLostError as error:
            if job.signals.asked:
                raise job.signals.error(f"stopped, and a worker was lost meanwhile. {GO_ON}") from error
            failures += 1
            if failures > limit:
                raise
            again = f"Starting the workers again ({failures} of {limit}: resources.max_failures)"
            text = f"{str(error).removesuffix(GO_ON)}{again}"
            job.events.emit({"event": "notice", "text": f"[yellow]warning[/yellow]: {escape(text)}"})
            release_placement_groups()
            resources = job.await_resources()


def _fit(job: Job, trainer: TorchTrainer) -> None:
    """One group of workers, from its start to its end.

    `fit` runs beside the main thread: in it, Ray takes Ctrl-C for itself and ends the process silently.
    """
    ended: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  # told apart below, in the main thread
            ended.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="trainer")
    job.events.forget_signs_of_life()
    thread.start()
    told = False
    while thread.is_alive():
        thread.join(_POLL_S)
        if job.signals.asked and not told:
            if job.events.silent_s is None:
                raise StoppedError("stopped before the workers had begun. The same command goes on")
            told = True
            job.events.emit({"event": "notice", "text": "stopping with a checkpoint (Ctrl-C again: at once)"})
            job.events.bell.ring.remote()
        job.signals.check_watched()
        silent_s = job.events.silent_s
        if silent_s is not None and silent_s > job.spec.engine.timeout_s:
            raise HungError(f"the workers gave no sign of life for {silent_s:.0f} s (engine.timeout_s). {GO_ON}")
    if ended:
        job.events.flush()
        raise cause_of(ended[0]) from ended[0]


# How often Ray Train looks at its workers; its own 2 s are also what it takes to see that they have ended.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def _trainer(job: Job, config: dict[str, Any], resources: Resources) -> TorchTrainer:
    return TorchTrainer(
        _worker,
        train_loop_config=config | {"log": job.events.log, "bell": job.events.bell},
        torch_config=TorchConfig(timeout_s=max(1, round(job.spec.engine.timeout_s))),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.per_worker(),
        ),
        run_config=RunConfig(
            # Checkpoints are our own (jobs.train.store): Ray Train keeps nothing to go on from under this name.
            name=".wj-ray-train",
            # It is looked at where its controller runs alone, and so need not be shared.
            storage_path=job.root.path(CHECKPOINTS) if job.root.is_local else _aside(job.spec.job_id),
            # Without a limit a group that cannot be placed is tried for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
    )


def _aside(job_id: str) -> str:
    return str(Path(tempfile.gettempdir()) / f"whisper-jobs-{os.getuid()}" / job_id)


def _worker(config: dict[str, Any]) -> None:
    from jobs.prepare import fetch_rows
    from jobs.train.loop import TrainTask, train

    session = RaySession(config["log"], config["bell"])
    session.emit({"event": "worker", "pid": os.getpid()})
    spec, storage = JobSpec.model_validate_json(config["spec"]), Storage(config["root"])
    try:
        splits = {name: fetch_rows(storage, name) for name in ("train", "val")}
    except NotFoundError:
        where = ray.util.get_node_ip_address()
        way_out = f"is not seen on the node {where}; give a folder that all nodes share as outdir or storage.uri"
        raise InputError([Fault(config["root"], way_out)]) from None
    task = TrainTask(spec, **splits, root=config["root"], revision=config["revision"])
    try:
        result = train(task, session)
    except WhisperJobsError:
        raise
    except Exception as error:  # noqa: BLE001  # the worker's outermost frame
        # What the libraries raise may not survive pickling, and its traceback would stay behind in a log of Ray's.
        session.emit({"event": "traceback", "rank": session.rank, "text": traceback.format_exc()})
        raise explain(error) from None
    if session.rank == 0:
        ray.get(config["log"].put_result.remote(result))


def cause_of(error: BaseException) -> WhisperJobsError:
    """What ended a group of workers. One worker's error makes the others fail in their collectives."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {0: error}
    return as_user_error(min((failure for _, failure in sorted(failures.items())), key=_weight))


def _weight(raised: BaseException) -> int:
    """What explains the others comes first; that the connection to another worker was lost explains nothing."""
    error = as_user_error(raised)
    if not isinstance(error, JobFailedError):
        return 0
    if isinstance(error, WorkerLostError):
        return 2 if isinstance(root_cause(raised), DEATHS) else 5
    if isinstance(error, HungError):
        return 3
    return 4 if type(error) is JobFailedError else 1
