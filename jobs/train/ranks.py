"""Virtual ranks: `resources.workers` of them define a training, however many workers there are to compute them.

Each has its clips of every step and random numbers of its own. With one worker for each, that is all there is to it; a
worker that computes several lets one after the other have this process's generators. So the effective batch, the clips
of each step and what is dropped out do not depend on the number of workers, and the result does by rounding alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jobs import distributed
from jobs.batches import seed_everything
from jobs.train.checkpoint import random_states, restore_random_states


class VirtualRanks:
    """The virtual ranks of one worker.

    Args:
        total: of all workers.
        rank: the worker's number.
        workers: how many there are.
    """

    def __init__(self, total: int, rank: int, workers: int) -> None:
        self.total = max(total, workers)
        self.mine = list(range(rank, self.total, workers))
        self._states: dict[int, dict[str, Any]] = {}
        """The generators of those that are not at work; empty where there is but one."""

    def seed(self, seed: int) -> None:
        """Begin: each drops out its own units; the seed of the order of rows is not touched by this."""
        for rank in reversed(self.mine):  # the first one stays in place
            seed_everything(seed + 1_000_003 * rank)
            self._keep(rank)

    @contextlib.contextmanager
    def at_work(self, rank: int) -> Iterator[None]:
        """Let a virtual rank draw its random numbers."""
        if len(self.mine) > 1:
            restore_random_states(self._states[rank])
        yield
        self._keep(rank)

    def gather(self) -> list[dict[str, Any]]:
        """The generators of all virtual ranks, in their order; all workers make this call."""
        states = self._states or {self.mine[0]: random_states()}
        return [state for _, state in sorted(distributed.gather(list(states.items())), key=lambda item: item[0])]

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Inverse of `gather`."""
        for rank in reversed(self.mine):
            restore_random_states(states[rank])
            self._keep(rank)

    def _keep(self, rank: int) -> None:
        if len(self.mine) > 1:
            self._states[rank] = random_states()
