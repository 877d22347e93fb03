"""Ray, at the edge: joining a cluster or starting one, checking what it holds, running tasks, passing events on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.failures import GO_ON, explain, first_line
from jobs.local_ray import LOCAL, is_local
from jobs.stopping import StopSignals
from service.errors import InfeasibleError, OutOfMemoryError, WhisperJobsError, WorkerLostError
from service.spec.job import JobSpec

Emit = Callable[[dict[str, Any]], None]


DEATHS = (
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
"""What Ray raises where a process or its node has gone."""

_MOST_WORKERS = 10_000

ELASTIC_SHARE = 0.1
"""How much of `resources.wait_s` an elastic job waits for room for all of its workers."""

_TRIES = 4
_POLL_S = 0.2
_PLACING_S = 5.0
"""What Ray takes at most to place workers where there is room."""
_TRYING_S = 3.0
"""The same, for each number of workers that is tried."""
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
def connected(signals: StopSignals) -> Iterator[bool]:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start a local Ray until this ends.

    Before Ray is imported, `jobs.local_ray.give_token` makes the local one refuse everybody else.

    Args:
        signals: takes the signals back from Ray, which sets a handler that ends the process without a word.

    Yields:
        whether Ray is a local one of our own.
    """
    address, local = os.environ.get("RAY_ADDRESS") or LOCAL, is_local()
    if local:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    else:
        _require_answer(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise InfeasibleError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error
    signals.install()
    try:
        yield local
    finally:
        ray.shutdown()


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
    # A trial of a search that trains in its own process is a worker to the cluster.
    workers = max(1, asked.workers) if spec.kind == "search" else asked.workers
    return Resources(workers, asked.cpus_per_worker, gpus)


def require_resources(
    spec: JobSpec, *, local: bool, tell: Callable[[str], None], check: Callable[[], None] = lambda: None
) -> Resources:
    """Wait until the cluster has room for the job's workers; an autoscaler sees what is asked for.

    Args:
        spec: the job.
        local: whether Ray is a local one of our own.
        tell: takes a line for whoever watches.
        check: called again and again; what it raises ends the wait.

    Returns:
        what there is room for: all workers, or, for an elastic job that has waited a while, fewer.

    Raises:
        InfeasibleError: there is none, within `resources.wait_s` (at once on a local Ray, which never grows).
    """
    needed = resources_for(spec)
    if local or not needed.workers:
        if missing := missing_resources(needed):
            raise _infeasible(needed, missing, "this machine" if local else "the cluster")
        return needed
    wait_s, started, told = spec.resources.wait_s, time.monotonic(), False
    wish = Wish(needed)
    try:
        # What was asked for when there was no GPU yet may be granted by the first node that has one.
        while not wish.granted(_POLL_S) or needed != resources_for(spec):
            check()
            waited_s, missing = time.monotonic() - started, missing_resources(needed)
            elastic = spec.resources.min_workers is not None and waited_s >= wait_s * ELASTIC_SHARE
            if elastic and (fewer := _fewer(spec, needed, check)):
                tell(f"there is room for {fewer.workers} of {needed.workers} workers: going on with them")
                return fewer
            if waited_s >= wait_s + (0 if missing else _PLACING_S):
                raise _infeasible(needed, missing, "the cluster")
            if not told and (missing or waited_s >= _PLACING_S):
                told = True
                tell(f"waiting for the cluster to offer {missing or _words(needed)}, {wait_s:g} s at most")
            if needed != (needed := resources_for(spec)):  # a node with GPUs has come, or has gone
                wish.withdraw()
                wish = Wish(needed)
    finally:
        wish.withdraw()
    if not needed.gpus and spec.resources.gpus_per_worker is None:
        tell("the cluster has no GPU: training on CPUs (resources.gpus_per_worker: 1 waits for GPUs)")
    return needed


class Wish:
    """Room for workers, asked for by a placement group: it waits for its turn, and an autoscaler adds nodes for it.

    `ray.autoscaler.sdk.request_resources` would be one request for the whole cluster: that of the last job to call it.
    """

    def __init__(self, resources: Resources) -> None:
        self._group: Any = placement_group([resources.per_worker()] * resources.workers)

    def granted(self, timeout_s: float = 0) -> bool:
        """Whether there is room now: it is held until the wish is withdrawn."""
        return bool(self._group.wait(timeout_s))

    def withdraw(self) -> None:
        """Ask no more, and give back."""
        remove_placement_group(self._group)


def _fewer(spec: JobSpec, needed: Resources, check: Callable[[], None]) -> Resources | None:
    """As many workers as there is room for, at least `min_workers` of them; None: there is not."""
    least, most = spec.resources.min_workers or 1, min(needed.workers - 1, _fitting(needed))
    found, tried = None, most  # that nobody else is there is the likeliest
    while least <= most:
        check()
        fewer = replace(needed, workers=tried)
        wish = Wish(fewer)
        try:
            if wish.granted(_TRYING_S):
                found, least = fewer, tried + 1
            else:
                most = tried - 1
        finally:
            wish.withdraw()
        tried = (least + most + 1) // 2
    return found


def _infeasible(needed: Resources, missing: str, where: str) -> InfeasibleError:
    way_out = "lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
    if missing:
        way_out = f"L{way_out[1:]}"
        asking = "1 process asks" if needed.workers == 1 else f"{needed.workers} workers ask"
        return InfeasibleError(f"resources: {asking} for {missing}; {where} has no more. {way_out}")
    return InfeasibleError(
        f"resources: {needed.workers} workers ask for {_words(needed)}, which {where} has, but other jobs hold them. "
        f"Wait longer (resources.wait_s), or {way_out}"
    )


def missing_resources(needed: Resources) -> str:
    """What no placement on the present nodes can give, in words; empty where all fits."""
    return "" if _fitting(needed) >= needed.workers else _words(needed, _nodes())


def groups_at_once(needed: Resources) -> int:
    """How many groups of such workers the present nodes can hold, were there no other job."""
    return _fitting(needed) // max(1, needed.workers)


def _fitting(needed: Resources) -> int:
    """How many such workers the present nodes can hold, were there no other job."""
    fitting = 0
    for node in _nodes():
        room = [node.get(name, 0.0) / amount for name, amount in needed.per_worker().items() if amount]
        fitting += int(min(room)) if room else needed.workers
    return fitting


def _nodes() -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _words(needed: Resources, nodes: list[dict[str, float]] | None = None) -> str:
    """What the workers ask for, and what there is of it."""
    parts = []
    for name, amount in needed.per_worker().items():
        there = "" if nodes is None else f" (there are {sum(node.get(name, 0.0) for node in nodes):g})"
        parts.append(f"{amount * needed.workers:g} {name}s{there}")
    return " and ".join(parts)


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away: preempted, drained by hand, or stopped with SIGTERM."""
    # There is no public call that asks; Ray Train's own watcher asks here too, but then decides by itself.
    return set(ray._private.state.state.get_draining_nodes())


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


class StopBell:
    """Tells all workers to stop. A Ray actor of coroutines: each worker waits in it, and threads would be too many."""

    def __init__(self) -> None:
        self.reset_now()

    async def ring(self) -> None:
        """Ask all workers to stop."""
        self._rung.set()

    async def reset(self) -> None:
        """Begin anew, for another group of workers."""
        self.reset_now()

    async def wait(self, node: str) -> None:
        """Return when the worker on this node is to stop."""
        self._nodes.add(node)
        await self._rung.wait()

    async def nodes(self) -> set[str]:
        """Ids of the nodes on which workers wait."""
        return self._nodes

    def reset_now(self) -> None:
        """See `reset`."""
        self._rung = asyncio.Event()
        self._nodes: set[str] = set()


class StopFlag:
    """Whether the job was asked to stop, for a worker that asks often: one call waits for it beside the work.

    Args:
        bell: the job's StopBell actor.
    """

    def __init__(self, bell: Any) -> None:
        self._asked = bell.wait.remote(ray.get_runtime_context().get_node_id())

    def is_set(self) -> bool:
        """Whether it was. (Also where the driver has gone: this worker is about to go too.)"""
        return bool(ray.wait([self._asked], timeout=0)[0])


class Events:
    """The job's events in the driver: each is stamped and handed to a function, in order.

    Args:
        show: takes an event.
    """

    def __init__(self, show: Emit) -> None:
        self._show = show
        self._lock = threading.RLock()  # one event at a time, whichever thread hands it on
        self._stop = threading.Event()
        self._heard: float | None = None
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # On the driver's node: they live and die together.
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
        self.log: Any = ray.remote(**options)(EventLog).remote()
        self.bell: Any = ray.remote(**options, max_concurrency=_MOST_WORKERS)(StopBell).remote()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="events")
        self._thread.start()

    def emit(self, event: dict[str, Any]) -> None:
        """Hand on an event of the driver itself, after all that came before it."""
        with self._lock:
            self.flush()
            self._hand_on(event)

    def flush(self) -> None:
        """Hand on what the workers have said so far. Where Ray has gone, that is lost; the job's end tells of it."""
        with self._lock:
            events: list[dict[str, Any]] = []
            with contextlib.suppress(ray.exceptions.RayError):
                events = ray.get(self.log.take.remote())
            if events:
                self._heard = time.monotonic()
            for event in events:
                self._hand_on(event)

    def forget_signs_of_life(self) -> None:
        """Begin to listen anew: a group of workers that is still being placed says nothing."""
        self._heard = None

    @property
    def silent_s(self) -> float | None:
        """Seconds since the workers' last event; None: they have not begun."""
        return None if self._heard is None else time.monotonic() - self._heard

    def close(self) -> None:
        """Hand on the rest and stop."""
        self._stop.set()
        self._thread.join()
        self.flush()

    def _hand_on(self, event: dict[str, Any]) -> None:
        self._show({"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | event)

    def _follow(self) -> None:
        while not self._stop.wait(_POLL_S):
            self.flush()


def run_tasks(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    cpus: float = 1,
    gpus: float = 0,
    wait_s: float = math.inf,
    check: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Run a function as one Ray task per tuple of arguments; those whose process dies are tried again.

    Args:
        function: runs in another process.
        calls: the arguments of each call.
        cpus: CPUs of each task.
        gpus: GPUs of each task.
        wait_s: how long to wait for a node where there is none that could run one.
        check: called again and again while they run; what it raises ends the wait.

    Raises:
        WhisperJobsError: as one of them raised it.
        InfeasibleError: no node could run one.
        WorkerLostError: the process of one died, each time that it was tried.
    """
    task = _task(function, cpus=cpus, gpus=gpus)
    tasks = [task.remote(*arguments) for arguments in calls]
    results: list[Any] = []
    lost, needed, homeless_since = 0, Resources(1, cpus, gpus), math.inf
    while len(results) < len(calls):
        index = len(results)
        while not ray.wait([tasks[index]], timeout=_POLL_S)[0]:
            check()
            homeless_since = math.inf if _fitting(needed) else min(homeless_since, time.monotonic())
            if time.monotonic() - homeless_since > wait_s:
                raise _infeasible(needed, missing_resources(needed), "the cluster")
        try:
            results.append(ray.get(tasks[index]))
        except ray.exceptions.RayError as error:
            failed = as_user_error(error)
            lost += 1
            if not isinstance(failed, WorkerLostError) or lost == _TRIES:
                raise failed from error
            tasks[index] = task.remote(*calls[index])
    return results


def _task(function: Callable[..., Any], *, cpus: float, gpus: float) -> Any:
    """A function as a Ray task whose errors come back whole: what the libraries raise may not survive pickling."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except WhisperJobsError:
            raise
        except Exception as error:  # noqa: BLE001  # the task's outermost frame
            failed = explain(error)
            failed.add_note(traceback.format_exc())  # shown with --debug
            raise failed from None

    # Ray's own retries would also repeat, for ever, a task that runs out of memory.
    return ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(call)


def as_user_error(error: BaseException) -> WhisperJobsError:
    """What Ray raised, as the user should see it."""
    error = root_cause(error)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return OutOfMemoryError(
            f"Ray ended a worker because its node ran out of memory ({first_line(error)}); lower "
            f"training.per_dev_batch (or set `per_dev_batch: auto`, with training.grad_accum the clips of a step) or "
            f"evaluation.batch_size, or give the workers more memory. {GO_ON}"
        )
    if isinstance(error, DEATHS):
        return WorkerLostError(f"a process of the job died ({_death(error)}). {GO_ON}")
    return explain(error)


def release_placement_groups() -> None:
    """Give back what a Ray Train controller of this job has left behind that died with its workers' room in its hands.

    Ray keeps such a group until the whole job ends, and Ray Train's own cleaner asks Ray's dashboard, which a local Ray
    has not. There is no public call that tells whose a group is.
    """
    accessor, job = ray._private.state.state._connect_and_get_accessor(), ray.get_runtime_context().get_job_id()
    for content in accessor.get_placement_group_table():
        found = PlacementGroupTableData.FromString(content)
        removed = found.state == PlacementGroupTableData.PlacementGroupState.REMOVED
        maker = found.creator_actor_id
        orphaned = maker and not ray.ActorID(maker).is_nil() and found.creator_actor_dead
        if found.creator_job_id.hex() == job and orphaned and not removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))


def root_cause(error: BaseException) -> BaseException:
    """What lies in the wrappings of Ray and Ray Train."""
    for name in ("cause", "_base_exc", "health_check_failure", "controller_failure"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return root_cause(inner)
    return error


def _death(error: BaseException) -> str:
    text = " ".join(str(error).split())
    for pattern in (r"exit detail: ([^.]+)", r"due to ([^.]+)"):
        if found := re.search(pattern, text):
            return found.group(1)[:200]
    return first_line(error)
