"""The training engine in Ray Train workers."""

from __future__ import annotations

import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from jobs.cluster import Resources, unwrap
from jobs.train.session import Write
from service.artifacts import CHECKPOINTS
from service.errors import Fault, InputError, JobFailedError, WhisperJobsError
from service.spec.job import JobSpec
from service.storage import Storage


class RaySession:
    """A worker of Ray Train, as the engine sees it.

    Args:
        log: the job's EventLog actor.
    """

    def __init__(self, log: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self._log = log

    @contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        """See Session."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
        else:
            with checkpoint.as_directory() as folder:
                yield Path(folder)

    def save(self, metrics: dict[str, float], write: Write) -> None:
        """See Session."""
        if self.rank != 0:
            ray.train.report(metrics)  # a report waits for all ranks
            return
        with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as folder:
            write(Path(folder))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))

    def emit(self, event: dict[str, Any]) -> None:
        """See Session."""
        if self.rank == 0:
            self._log.emit.remote(event)


def train_on_ray(spec: JobSpec, root: str, splits: dict[str, str], resources: Resources, log: Any) -> dict[str, Any]:
    """Run the engine in a group of workers; returns what `jobs.train.loop.train` returns.

    Raises:
        WhisperJobsError: as a worker raised it.
        JobFailedError: a worker died otherwise, or could not be placed.
    """
    storage = Storage(root)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": spec.to_json(), "root": root, "splits": splits, "log": log},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.per_worker(),
        ),
        run_config=RunConfig(
            # Ray Train goes on from the checkpoints under this name: the hash keeps other specs out.
            name=spec.sha256[:16],
            storage_path=storage.path(CHECKPOINTS),
            checkpoint_config=CheckpointConfig(num_to_keep=spec.engine.keep_checkpoints),
            # Without a limit a group that cannot be placed is tried for ever.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
    )
    try:
        _fit(trainer)
    except TrainingFailedError as error:
        raise _cause(error) from error
    return dict(ray.get(log.result.remote()))


def _fit(trainer: TorchTrainer) -> None:
    """Run `trainer.fit()` beside the main thread: in it, Ray takes Ctrl-C for itself and ends the process silently."""
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  # raised again below, in the main thread
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="trainer")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failures:
        raise failures[0]


def _worker(config: dict[str, Any]) -> None:
    from jobs.train.loop import TrainTask, train

    session = RaySession(config["log"])
    if not Path(config["splits"]["train"]).exists():
        where = ray.util.get_node_ip_address()
        way_out = f"is not seen on the node {where}; give a folder that all nodes share as outdir or storage.uri"
        raise InputError([Fault(config["root"], way_out)])
    task = TrainTask(
        JobSpec.model_validate_json(config["spec"]), config["splits"]["train"], config["splits"]["val"], config["root"]
    )
    try:
        result = train(task, session)
    except WhisperJobsError:
        raise
    except Exception as error:  # noqa: BLE001  # the worker's outermost frame
        # What the libraries raise may not survive pickling, and its traceback would stay behind in a log of Ray's.
        session.emit({"event": "traceback", "rank": session.rank, "text": traceback.format_exc()})
        raise unwrap(error) from None
    if session.rank == 0:
        ray.get(config["log"].put_result.remote(result))


def _cause(error: TrainingFailedError) -> WhisperJobsError:
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "_base_exc", failure) for _, failure in sorted(failures.items())]
    causes = [cause.cause if isinstance(cause, ray.exceptions.RayTaskError) else cause for cause in causes]
    # One worker's error makes the others fail in their collectives: ours says more than theirs.
    for cause in causes:
        if isinstance(cause, WhisperJobsError) and not isinstance(cause, JobFailedError):
            return cause
    if causes:
        return unwrap(causes[0])
    return unwrap(getattr(error, "controller_failure", error))
