"""The training engine in Ray Train workers; a group that loses a worker is started again from the last checkpoint.

So is one whose node is about to be taken away, and an elastic one for which there is more room again; these stop with a
checkpoint of their last step first (`jobs.train.moves`).
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from jobs.cluster.errors import DEATHS, as_user_error, root_cause
from jobs.cluster.placement import release_placement_groups
from jobs.cluster.resources import Resources
from jobs.cluster.stop_bell import StopFlag
from jobs.failures import GO_ON, explain, first_line
from jobs.train.moves import Moves, PoliteTorchConfig, asked_to_end
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
    from jobs.job import Run

_POLL_S = 0.2
_SWEEP_EVERY_S = 5.0


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
        return self._stop.is_set() or asked_to_end()


def train_on_ray(job: Run, revision: str | None, data: Storage | None = None, *, trial: bool = False) -> dict[str, Any]:
    """Run the engine in a group of workers; returns what `jobs.train.loop.train` returns.

    Args:
        job: the training.
        revision: commit of the base model.
        data: the root that has the prepared rows, where it is not the training's own.
        trial: see `jobs.train.loop.TrainTask`.

    A worker that dies costs the steps since the last checkpoint: the group is started again, `resources.max_failures`
    times at most. Ray Train's own retries would also repeat what fails in the same way each time. A group that moves
    costs no step, and does not count.

    Raises:
        WhisperJobsError: as a worker raised it.
        WorkerLostError: workers died too often.
        InfeasibleError: there is no room for the workers any more.
        HungError: a worker gave no sign of life.
        StoppedError: the user asked for it, or the job's own node is taken away; a checkpoint is kept.
    """
    config: dict[str, Any] = {"spec": job.spec.to_json(), "root": job.root.path(), "revision": revision}
    config |= {"data": (data or job.root).path(), "trial": trial}
    limit, failures, resources = job.spec.resources.max_failures, 0, job.resources
    while True:
        counted = ""
        with Moves(job, resources) as moves:
            try:
                _fit(job, _trainer(job, config, resources), moves)
                return dict(ray.get(job.events.log.result.remote()))
            except StoppedError as error:
                if job.signals.asked:
                    raise job.signals.error(str(error)) from error
                if moves.ends_here:
                    raise StoppedError(f"{moves.reason}: {error}") from error
                again = f"{str(error).split(';')[0]}: {moves.reason or 'a worker was asked to end (SIGTERM)'}. "
            except WorkerLostError as error:
                if job.signals.asked:
                    raise job.signals.error(f"stopped, and a worker was lost meanwhile. {GO_ON}") from error
                if moves.ends_here:
                    raise StoppedError(f"{moves.reason}, before a checkpoint was written. {GO_ON}") from error
                again = str(error).removesuffix(GO_ON)
                if moves.leaving:
                    again = f"{again}It came too soon for a checkpoint: {moves.reason}. "
                else:
                    failures += 1
                    counted = f" ({failures} of {limit}: resources.max_failures)"
                    if failures > limit:
                        raise
        text = f"{again}Starting the workers again{counted}"
        job.events.emit({"event": "notice", "level": "warning", "text": text})
        release_placement_groups()
        resources = job.await_resources()


def _fit(job: Run, trainer: TorchTrainer, moves: Moves) -> None:
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
    ray.get(job.events.bell.reset.remote())
    thread.start()
    told, swept = False, -math.inf
    while thread.is_alive():
        if job.events.silent_s is None and time.monotonic() - swept > _SWEEP_EVERY_S:
            swept = time.monotonic()
            release_placement_groups()  # of trainings that this job has given up, in whose place it may wait
        thread.join(_POLL_S)
        if job.signals.asked and not told:
            if job.events.silent_s is None:
                raise StoppedError("stopped before the workers had begun. The same command goes on")
            told = True
            job.events.emit({"event": "notice", "text": "stopping with a checkpoint (Ctrl-C again: at once)"})
            job.events.bell.ring.remote()
        job.signals.check_watched()
        if moves.look():
            text = f"{moves.reason}: stopping with a checkpoint"
            job.events.emit({"event": "notice", "level": "warning", "text": text})
            job.events.bell.ring.remote()
        silent_s = job.events.silent_s
        if silent_s is not None and silent_s > job.spec.engine.timeout_s:
            raise HungError(f"the workers gave no sign of life for {silent_s:.0f} s (engine.timeout_s). {GO_ON}")
    if ended:
        job.events.flush()
        raise cause_of(ended[0]) from ended[0]


# How often Ray Train looks at its workers; its own 2 s are also what it takes to see that they have ended.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
# It would restart the group by itself; see jobs.train.moves.
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"


def _trainer(job: Run, config: dict[str, Any], resources: Resources) -> TorchTrainer:
    return TorchTrainer(
        _worker,
        train_loop_config=config | {"log": job.events.log, "bell": job.events.bell},
        torch_config=PoliteTorchConfig(timeout_s=max(1, round(job.spec.engine.timeout_s))),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.per_worker(),
        ),
        run_config=RunConfig(
            # Checkpoints are our own (jobs.train.store): Ray Train keeps nothing to go on from under this name.
            name=".wj-ray-train",
            # It is looked at where its controller runs alone, and so need not be shared.
            storage_path=job.root.path(CHECKPOINTS) if job.root.is_local else _aside(job.root.path()),
            # All is tried again in `train_on_ray`, once there is room.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _aside(root: str) -> str:
    """A folder of this run's own on this machine: others may have the same job id, and another root."""
    name = hashlib.sha256(root.encode()).hexdigest()[:16]
    return str(Path(tempfile.gettempdir()) / f"whisper-jobs-{os.getuid()}" / name)


def _worker(config: dict[str, Any]) -> None:
    from jobs.prepare import fetch_rows
    from jobs.train.loop import TrainTask, train

    session = RaySession(config["log"], config["bell"])
    session.emit({"event": "worker", "pid": os.getpid()})
    spec, data = JobSpec.model_validate_json(config["spec"]), Storage(config["data"])
    try:
        train_rows, val_rows = (fetch_rows(data, name) for name in ("train", "val"))
    except NotFoundError:
        where = ray.util.get_node_ip_address()
        way_out = f"is not seen on the node {where}; give a folder that all nodes share as outdir or storage.uri"
        raise InputError([Fault(config["data"], way_out)]) from None
    task = TrainTask(spec, train_rows, val_rows, config["root"], config["revision"], config["trial"])
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
    cause = root_cause(error)
    if type(cause).__name__.startswith("WorkerGroupStartup"):  # what goes wrong before there are workers
        return WorkerLostError(f"the workers could not be started ({first_line(cause)}). {GO_ON}")
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
