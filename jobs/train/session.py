"""The seam between the engine and what runs it: who the other workers are, where events go, whether to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Session(Protocol):
    """What the engine needs of its surroundings. Ray Train is behind it in a job, nothing in tests."""

    rank: int
    workers: int

    def emit(self, event: dict[str, Any]) -> None:
        """Tell whoever follows the job. Only rank 0's events are passed on."""

    def stopping(self) -> bool:
        """Whether the job was asked to stop. Workers may hear of it at different times."""


class LocalSession:
    """One process without Ray Train.

    Args:
        emit: takes events; without it they are kept in `events`.
        stopping: whether to stop.
    """

    def __init__(
        self, emit: Callable[[dict[str, Any]], None] | None = None, stopping: Callable[[], bool] = lambda: False
    ) -> None:
        self.rank, self.workers = 0, 1
        self.events: list[dict[str, Any]] = []
        self._emit = emit or self.events.append
        self._stopping = stopping

    def emit(self, event: dict[str, Any]) -> None:
        """See Session."""
        self._emit(event)

    def stopping(self) -> bool:
        """See Session."""
        return self._stopping()
