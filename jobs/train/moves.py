"""Why a group of workers is to stop with a checkpoint and start again in other places: what the driver looks for.

Ray Train's own watcher of preempted nodes restarts groups by itself, and knows nothing of our checkpoints or of elastic
jobs; it is switched off where the trainer is made.
"""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.train.torch import TorchConfig

from jobs.cluster.placement import Wish, draining_nodes
from jobs.cluster.resources import Resources
from service.spec.counted import counted

if TYPE_CHECKING:
    from jobs.job import Run

_LOOK_EVERY_S = 1.0


class Moves:
    """Looks, beside a group of workers at work, for what makes it move. A context that gives back what it asked for.

    Args:
        job: the job.
        resources: what the group has.
    """

    def __init__(self, job: Run, resources: Resources) -> None:
        self.reason: str | None = None
        """Why the group is to move; None: it is not."""
        self.leaving = False
        """Whether it is because a node goes away."""
        self.ends_here = False
        """Whether it is the job's own node that goes away: then the job ends, with a checkpoint."""
        self._job, self._looked = job, 0.0
        self._here: str = ray.get_runtime_context().get_node_id()
        self._most = job.spec.resources.workers
        self._missing = replace(resources, workers=self._most - resources.workers)
        self._wish: Wish | None = None

    def __enter__(self) -> Moves:
        return self

    def __exit__(self, *_: object) -> None:
        if self._wish:
            self._wish.withdraw()

    def look(self) -> bool:
        """Look, now and then; whether there is a new reason to move."""
        if self.reason or time.monotonic() - self._looked < _LOOK_EVERY_S:
            return False
        self._looked = time.monotonic()
        self.reason = self._found()
        return self.reason is not None

    def _found(self) -> str | None:
        leaving = draining_nodes()
        if self._here in leaving:
            self.leaving = self.ends_here = True
            return f"the job's own node {address_of(self._here)} is being taken away"
        if leaving:
            nodes = leaving & ray.get(self._job.events.bell.nodes.remote())
            if nodes:
                self.leaving = True
                where = ", ".join(sorted(address_of(node) for node in nodes))
                return f"node {where} is being taken away"
        if self._missing.workers <= 0 or self._job.events.silent_s is None:
            return None
        # Not before the workers have begun: it would take the room that they wait for.
        self._wish = self._wish or Wish(self._missing)
        if self._wish.granted():
            return f"there is room for {counted(self._most, 'worker')} again"
        return None


def address_of(node: str) -> str:
    """A node's address, for people."""
    found = [str(each["NodeManagerAddress"]) for each in ray.nodes() if each["NodeID"] == node]
    return found[0] if found else node[:8]


_signals: list[int] = []
"""The reading end of a pipe into which the system's part of Python's signal handling writes, once there is one."""


def asked_to_end() -> bool:
    """Whether this worker's process got a SIGTERM."""
    return bool(_signals and select.select(_signals, [], [], 0)[0])


def take_sigterm() -> None:
    """Have a SIGTERM to this process end the step, not the process: Ray's own handler ends it at once.

    Handlers run in the main thread, which Ray leaves for its own code for half a second at a time; the pipe is written
    to when the signal comes.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    _signals.append(reading)


class PoliteTorchConfig(TorchConfig):
    """Process groups as Ray Train makes them, in workers that take a SIGTERM as a request."""

    @property
    def backend_cls(self) -> Any:
        """Runs in the main thread of each worker's process, where alone signals can be taken."""

        class Backend(super().backend_cls):  # type: ignore[misc]
            def on_start(self, worker_group: Any, backend_config: Any) -> None:
                super().on_start(worker_group, backend_config)
                worker_group.execute(take_sigterm)

        return Backend
