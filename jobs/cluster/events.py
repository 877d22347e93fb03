"""What all processes of a job say, in order, in its driver."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jobs.cluster.stop_bell import StopBell

_MOST_WORKERS = 10_000
_POLL_S = 0.2


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

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
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
