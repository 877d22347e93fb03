"""The shared engine as a Ray actor, one per GPU, and the runner in a trial's driver that talks to it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from jobs.cluster.errors import as_user_error
from jobs.cluster.stop_bell import StopFlag
from jobs.search.runner import Event, TrialRun
from service.errors import WhisperJobsError, WorkerLostError
from service.spec.job import JobSpec

_WAIT_S = 1.0
_FORGOTTEN_S = 120.0
"""A trial whose driver has not asked for so long has none any more."""


@dataclass
class _Taken:
    """A trial in an engine."""

    said: queue.SimpleQueue[Event | BaseException] = field(default_factory=queue.SimpleQueue)
    heard_s: float = field(default_factory=time.monotonic)
    stopped: bool = False
    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Search:
    """What an engine has to know of the search that it works for.

    Attributes:
        spec: the search, as JSON.
        revision: commit of the base model.
        bell: the job's StopBell actor.
    """

    spec: str
    revision: str | None
    bell: Any


class EngineActor:
    """A `SharedEngine` in a process of its own. Its methods are called by many trials at once."""

    # It takes no arguments: those of an actor that may be begun again must outlive whoever began it, and Ray warns.
    def __init__(self) -> None:
        self._engine: Any = None
        self._stopping: StopFlag | None = None
        self._loading = threading.Lock()
        self._trials: dict[int, _Taken] = {}
        self._numbers = itertools.count()

    def begin(self, run: TrialRun, search: Search) -> int:
        """Take a trial; returns by which number it is asked for."""
        number, taken = next(self._numbers), _Taken()
        self._trials[number] = taken
        threading.Thread(target=self._go, args=(run, search, taken), daemon=True, name=f"trial {number}").start()
        return number

    def take(self, number: int) -> list[Event | BaseException]:
        """What a trial has said since the last call; waits a moment for it."""
        if (taken := self._trials.get(number)) is None:
            return [WorkerLostError("the engine was begun again")]
        taken.heard_s = time.monotonic()
        found: list[Event | BaseException] = []
        with contextlib.suppress(queue.Empty):
            found.append(taken.said.get(timeout=_WAIT_S))
            while True:
                found.append(taken.said.get_nowait())
        return found

    def end(self, number: int) -> None:
        """Stop a trial, and wait for its checkpoint."""
        if taken := self._trials.pop(number, None):
            taken.stopped = True
            taken.ended.wait()

    def _go(self, run: TrialRun, search: Search, taken: _Taken) -> None:
        from jobs.failures import explain

        bell = self._bell(search)

        def stopping() -> bool:
            forgotten = time.monotonic() - taken.heard_s > _FORGOTTEN_S
            return taken.stopped or forgotten or bell.is_set()

        try:
            for event in self._shared(search).events(run, stopping):
                taken.said.put(event)
        except WhisperJobsError as error:
            taken.said.put(error)
        except BaseException as error:  # noqa: BLE001  # told to the trial's driver
            taken.said.put(explain(error) if isinstance(error, Exception) else error)
        finally:
            taken.ended.set()

    def _bell(self, search: Search) -> StopFlag:
        with self._loading:
            if self._stopping is None:
                self._stopping = StopFlag(search.bell)
        return self._stopping

    def _shared(self, search: Search) -> Any:
        from jobs.search.shared.engine import SharedEngine

        with self._loading:
            if self._engine is None:
                self._engine = SharedEngine(JobSpec.model_validate_json(search.spec), search.revision)
        return self._engine


@dataclass(frozen=True)
class Engine:
    """An engine as a trial's driver has it."""

    actor: Any
    search: Search


def start_engines(
    spec: JobSpec, revision: str | None, bell: Any, count: int, resources: dict[str, float]
) -> list[Engine]:
    """Start engines, each with the resources of a worker."""
    actor = ray.remote(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        max_concurrency=1000,
        max_restarts=spec.resources.max_failures,
    )(EngineActor)
    search = Search(spec.to_json(), revision, bell)
    return [Engine(actor.remote(), search) for _ in range(count)]


class InEngine:
    """Has a trial trained by an engine.

    Args:
        engines: of the search.
        number: of the trial; they are dealt out in turn.
        max_failures: how often an engine may die.
    """

    def __init__(self, engines: Sequence[Engine], number: int, max_failures: int) -> None:
        self._engine = engines[number % len(engines)]
        self._max_failures = max_failures

    def events(self, run: TrialRun, stopping: Callable[[], bool]) -> Generator[Event]:
        """See TrialRunner. The engine itself hears of a stop of the whole search. One that has died is begun again by
        Ray, and the trial goes on in it from its last checkpoint."""
        for failures in itertools.count(1):
            try:
                yield from self._events(run)
                return
            except WorkerLostError:
                if failures > self._max_failures:
                    raise

    def _events(self, run: TrialRun) -> Generator[Event]:
        engine, number = self._engine.actor, None
        try:
            number = ray.get(engine.begin.remote(run, self._engine.search))
            while True:
                for item in ray.get(engine.take.remote(number)):
                    if isinstance(item, BaseException):
                        raise item
                    yield item
                    if item["event"] == "result":
                        return
        except ray.exceptions.RayError as error:
            raise as_user_error(error) from error
        finally:
            if number is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(engine.end.remote(number))
