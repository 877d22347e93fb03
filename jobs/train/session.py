"""The seam between the engine and what runs it: where checkpoints go, where events go, who the other workers are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

Write = Callable[[Path], None]
"""Fills a folder with a checkpoint."""


class Session(Protocol):
    """What the engine needs of its surroundings. Ray Train is behind it in a job, a plain folder in tests."""

    rank: int
    workers: int

    def resume_from(self) -> AbstractContextManager[Path | None]:
        """The newest complete checkpoint as a folder, or None."""

    def save(self, metrics: dict[str, float], write: Write) -> None:
        """Keep a checkpoint. Every worker calls it; rank 0's is written."""

    def emit(self, event: dict[str, Any]) -> None:
        """Tell whoever follows the job. Only rank 0's events are passed on."""


class FolderSession:
    """One process without Ray Train: checkpoints in a folder.

    Args:
        folder: where checkpoints go.
        keep: how many of the last ones stay.
        emit: takes events; without it they are kept in `events`.
    """

    def __init__(self, folder: Path, keep: int = 2, emit: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.rank, self.workers = 0, 1
        self.events: list[dict[str, Any]] = []
        self._folder, self._keep = folder, keep
        self._emit = emit or self.events.append

    def _checkpoints(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))

    @contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        """See Session."""
        found = self._checkpoints()
        yield found[-1] if found else None

    def save(self, metrics: dict[str, float], write: Write) -> None:
        """See Session."""
        aside = self._folder / ".new"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        aside.rename(self._folder / f"checkpoint-{int(metrics['step'])}")
        for old in self._checkpoints()[: -self._keep]:
            shutil.rmtree(old)

    def emit(self, event: dict[str, Any]) -> None:
        """See Session."""
        self._emit(event)
