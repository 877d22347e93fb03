"""Ray, at the edge: joining a cluster or starting one, checking what it holds, running tasks, passing events on."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from service.errors import InfeasibleError, JobFailedError, StoppedError, WhisperJobsError
from service.spec.job import JobSpec

Emit = Callable[[dict[str, Any]], None]

LOCAL_ENVIRONMENT = {
    # Ray's own default depends on whether a token lies about; a local Ray listens on this machine alone.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_POLL_S = 0.2
_ANSWER_S = 10.0


@dataclass(frozen=True)
class Resources:
    """What each training worker asks for."""

    workers: int
    cpus: float
    gpus: float

    def per_worker(self) -> dict[str, float]:
        """For Ray."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@contextlib.contextmanager
def connected() -> Iterator[bool]:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start a local Ray until this ends.

    Yields:
        whether Ray is a local one of our own.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    if local:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    else:
        _require_answer(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise InfeasibleError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error
    # Only now: Ray sets a handler of its own when it starts, which ends the process without a word.
    signal.signal(signal.SIGTERM, _stopped)
    try:
        yield local
    finally:
        ray.shutdown()


def _stopped(number: int, frame: FrameType | None) -> None:
    raise StoppedError("stopped (SIGTERM); the same command goes on from the last checkpoint")


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try again for a quarter of an hour.

    Raises:
        InfeasibleError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise InfeasibleError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error


def resources_for(spec: JobSpec) -> Resources:
    """What the job's workers ask for; with no word on GPUs, one each where the cluster has any."""
    asked = spec.resources
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    return Resources(asked.workers, asked.cpus_per_worker, gpus)


def require_resources(spec: JobSpec, *, local: bool, tell: Callable[[str], None]) -> Resources:
    """Wait until the cluster can hold the job; an autoscaler is told what is asked for.

    Args:
        spec: the job.
        local: whether Ray is a local one of our own.
        tell: takes a line for whoever watches.

    Raises:
        InfeasibleError: it cannot, within `resources.wait_s` (at once on a local Ray, which never grows).
    """
    deadline = time.monotonic() + (0 if local else spec.resources.wait_s)
    # Ray Train's own patience with a cluster that is busy with other jobs.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(max(60.0, spec.resources.wait_s)))
    waiting = False
    while True:
        needed = resources_for(spec)
        missing = _missing(needed)
        if not missing:
            if waiting:
                request_resources(bundles=[])
            if not local and not needed.gpus and spec.resources.gpus_per_worker is None:
                tell("the cluster has no GPU: training on CPUs (resources.gpus_per_worker: 1 waits for GPUs)")
            return needed
        if not local and not waiting:
            waiting = True
            request_resources(bundles=[needed.per_worker()] * needed.workers)
            tell(f"waiting for the cluster to offer {missing}, {spec.resources.wait_s:g} s at most")
        if time.monotonic() >= deadline:
            if waiting:
                request_resources(bundles=[])
            where = "this machine" if local else "the cluster"
            raise InfeasibleError(
                f"resources: {needed.workers} workers ask for {missing}; {where} has no more. "
                "Lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
            )
        time.sleep(min(5.0, max(_POLL_S, deadline - time.monotonic())))


def _missing(needed: Resources) -> str:
    """What no placement on the present nodes can give, in words; empty where all fits."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    fitting = 0
    for node in nodes:
        room = [node.get(name, 0.0) / amount for name, amount in needed.per_worker().items() if amount]
        fitting += int(min(room)) if room else needed.workers
    if fitting >= needed.workers:
        return ""
    parts = []
    for name, amount in needed.per_worker().items():
        total = sum(node.get(name, 0.0) for node in nodes)
        parts.append(f"{amount * needed.workers:g} {name}s (there are {total:g})")
    return " and ".join(parts)


class EventLog:
    """Gathers the events of all processes of a job, as a Ray actor; the driver takes them from here."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._result: Any = None

    def emit(self, event: dict[str, Any]) -> None:
        """Keep an event until it is taken."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """All events since the last call."""
        taken, self._events = self._events, []
        return taken

    def put_result(self, result: Any) -> None:
        """Keep what a group of workers has produced."""
        self._result = result

    def result(self) -> Any:
        """What `put_result` was given last."""
        return self._result


class Events:
    """The job's events in the driver: each is stamped and handed to a function, in order.

    Args:
        show: takes an event.
    """

    def __init__(self, show: Emit) -> None:
        self._show = show
        self._lock = threading.RLock()  # one event at a time, whichever thread hands it on
        self._stop = threading.Event()
        self.log: Any = ray.remote(num_cpus=0)(EventLog).remote()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="events")
        self._thread.start()

    def emit(self, event: dict[str, Any]) -> None:
        """Hand on an event of the driver itself, after all that came before it."""
        with self._lock:
            self.flush()
            self._hand_on(event)

    def flush(self) -> None:
        """Hand on what the workers have said so far."""
        with self._lock:
            for event in ray.get(self.log.take.remote()):
                self._hand_on(event)

    def close(self) -> None:
        """Hand on the rest and stop."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            self.flush()

    def _hand_on(self, event: dict[str, Any]) -> None:
        self._show({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | event)

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            with contextlib.suppress(ray.exceptions.RayError):
                self.flush()


def run_task(function: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0) -> Any:
    """Run a function as a Ray task and return what it returns.

    Raises:
        WhisperJobsError: as the function raised it.
        JobFailedError: it died otherwise.
    """
    return await_tasks([remote_task(function, cpus=cpus, gpus=gpus).remote(*arguments)])[0]


def remote_task(function: Callable[..., Any], *, cpus: float, gpus: float) -> Any:
    """A function as a Ray task whose errors come back whole: what the libraries raise may not survive pickling."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except WhisperJobsError:
            raise
        except Exception as error:  # noqa: BLE001  # the task's outermost frame
            failed = unwrap(error)
            failed.add_note(traceback.format_exc())  # shown with --debug
            raise failed from None

    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(call)


def await_tasks(tasks: list[Any]) -> list[Any]:
    """The results of Ray tasks.

    Raises:
        WhisperJobsError: as one of them raised it.
        JobFailedError: one died otherwise.
    """
    try:
        return list(ray.get(tasks))
    except ray.exceptions.RayTaskError as error:
        raise unwrap(error.cause if isinstance(error.cause, BaseException) else error) from error
    except ray.exceptions.RayError as error:
        raise JobFailedError(f"a task was lost ({_first_line(error)})") from error


def unwrap(error: BaseException) -> WhisperJobsError:
    """The error that the user should see: ours as it is, any other as a failed job with its type and message."""
    if isinstance(error, WhisperJobsError):
        return error
    way_out = ""
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError | ray.exceptions.OutOfMemoryError):
        way_out = "; lower training.per_dev_batch (and raise training.grad_accum) or evaluation.batch_size, or set "
        way_out += "engine.gradient_checkpointing"
    return JobFailedError(f"{type(error).__name__}: {_first_line(error)}{way_out}")


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return lines[0][:300] if lines else "no message"
