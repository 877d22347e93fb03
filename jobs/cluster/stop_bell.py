"""Telling all workers of a job to stop."""

from __future__ import annotations

import asyncio
from typing import Any

import ray


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
