"""The seam between a search and what trains its trials: a train job's spec goes in, a stream of events comes out.

A runner lives in the process of a trial's driver and runs one training at a time. Closing its stream ends that one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.stopping import StopSignals
from jobs.train.here import train_here
from service.errors import InfeasibleError, WhisperJobsError
from service.spec.job import JobSpec
from service.storage import Storage

Event = dict[str, Any]
Work = Callable[[Callable[[Event], None], StopSignals], dict[str, Any]]
"""Trains: takes where events go and what may ask it to stop; returns what `jobs.train.loop.train` does."""


@dataclass(frozen=True)
class TrialRun:
    """One training of a trial.

    Args:
        spec: the train job at the trial's point.
        root: where its checkpoints go.
        data: the root that has the prepared rows.
        revision: commit of the base model.
    """

    spec: JobSpec
    root: Storage
    data: Storage
    revision: str | None


class TrialRunner(Protocol):
    """What trains trials."""

    def events(self, run: TrialRun, stopping: Callable[[], bool]) -> Generator[Event]:
        """The engine's events as they come, the last one {"event": "result", "result": ...}.

        Args:
            run: what to train.
            stopping: whether the whole search is to stop.

        Raises:
            StoppedError: it was asked to stop, and has left a checkpoint.
            WhisperJobsError: as the engine raised it.
        """


class InProcess:
    """Trains in the trial's own process, which has the CPUs and the share of a GPU itself: `resources.workers: 0`."""

    def events(self, run: TrialRun, stopping: Callable[[], bool]) -> Generator[Event]:
        """See TrialRunner."""
        return stream(functools.partial(_train_here, run), stopping)


class InWorkers:
    """Trains in a TorchTrainer's group of workers, by the very code of a train job."""

    def events(self, run: TrialRun, stopping: Callable[[], bool]) -> Generator[Event]:
        """See TrialRunner."""
        return stream(functools.partial(_train_in_workers, run), stopping)


def runner_for(spec: JobSpec) -> TrialRunner:
    """What trains the trials of a search."""
    return InWorkers() if spec.resources.workers else InProcess()


def stream(work: Work, stopping: Callable[[], bool]) -> Generator[Event]:
    """Run work in a thread; yield what it says. Closing it ends the work."""
    said: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
    signals = StopSignals()
    signals.watch(lambda: signals.ask() if stopping() else None)

    def go() -> None:
        try:
            said.put({"event": "result", "result": work(said.put, signals)})
        except BaseException as error:  # noqa: BLE001  # raised in the other thread
            said.put(error)

    thread = threading.Thread(target=go, daemon=True, name="trial")
    thread.start()
    try:
        while True:
            item = said.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item["event"] == "result":
                return
    finally:
        signals.ask()
        thread.join()


def _train_here(run: TrialRun, say: Callable[[Event], None], signals: StopSignals) -> dict[str, Any]:
    from accelerate.state import AcceleratorState

    from jobs.failures import explain

    AcceleratorState._reset_state(reset_partial_state=True)  # this process trains once per repeat
    try:
        return train_here(run.spec, run.root, run.data, run.revision, say, signals, trial=True)
    except WhisperJobsError:
        raise
    except Exception as error:  # told apart by what they mean, as a worker's are
        raise explain(error) from error
    finally:
        _free_memory()


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _train_in_workers(run: TrialRun, say: Callable[[Event], None], signals: StopSignals) -> dict[str, Any]:
    from jobs.cluster.resources import resources_for
    from jobs.cluster.waiting import require_resources
    from jobs.job import Run
    from jobs.train.on_ray import train_on_ray

    # A group waits for its turn, and for nodes: that there is no room at all any more is the search's to see.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "1000000000"

    def tell(text: str) -> None:
        say({"event": "notice", "text": text})

    with _events(say) as events:

        def wait() -> Any:
            # After a loss. Other trials may hold the room: that is no reason to end.
            while True:
                with contextlib.suppress(InfeasibleError):
                    return require_resources(run.spec, local=False, tell=tell, check=signals.check)

        job = Run(run.spec, run.root, events, resources_for(run.spec), signals, wait)
        return train_on_ray(job, run.revision, run.data, trial=True)


@contextlib.contextmanager
def _events(say: Callable[[Event], None]) -> Iterator[Any]:
    import ray

    from jobs.cluster.events import Events

    events = Events(say)
    try:
        yield events
    finally:
        events.close()
        for actor in (events.log, events.bell):
            ray.kill(actor)
