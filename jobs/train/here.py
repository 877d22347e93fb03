"""The engine in the process that calls it, without Ray Train."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jobs.stopping import StopSignals
from service.spec.job import JobSpec
from service.storage import Storage

if TYPE_CHECKING:
    pass


def train_here(
    spec: JobSpec,
    root: Storage,
    data: Storage,
    revision: str | None,
    emit: Callable[[dict[str, Any]], None],
    signals: StopSignals,
    *,
    trial: bool = False,
    trainer: Callable[[Any, Any], Any] | None = None,
) -> dict[str, Any]:
    """Train as the only worker; returns, and raises, what `jobs.train.loop.train` does.

    Args:
        spec: the train job.
        root: where its results go.
        data: the root that has the prepared rows.
        revision: commit of the base model.
        emit: takes events.
        signals: what may ask it to stop.
        trial: see `jobs.train.loop.TrainTask`.
        trainer: makes what trains, of a task and a session; None: `jobs.train.loop.Trainer`.
    """
    from jobs.prepare import fetch_rows
    from jobs.train.loop import Trainer, TrainTask
    from jobs.train.session import LocalSession

    def stopping() -> bool:
        signals.check_watched()
        return signals.asked

    train_rows, val_rows = (fetch_rows(data, name) for name in ("train", "val"))
    task = TrainTask(spec, train_rows, val_rows, root.path(), revision, trial)
    return dict((trainer or Trainer)(task, LocalSession(emit, stopping)).run())
