"""Trials that train together in threads of this process, as a search's engine has them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState

from jobs.search.runner import TrialRun
from jobs.search.shared.engine import SharedEngine
from service.errors import WhisperJobsError
from service.spec.job import JobSpec
from service.storage import Storage


def run_together(
    engine: SharedEngine, specs: list[JobSpec], data: Storage, stopping: Callable[[int], bool] = lambda index: False
) -> list[list[Any]]:
    """Each trial's events, the last one its result or what it raised.

    Args:
        engine: has them trained.
        specs: the trials' train jobs.
        data: the root with the rows that all of them train on.
        stopping: whether the trial of an index is to stop.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # an engine's process has one precision; this one many
    said: list[list[Any]] = [[] for _ in specs]

    def go(index: int) -> None:
        run = TrialRun(specs[index], Storage(specs[index].root), data, None)
        try:
            for event in engine.events(run, lambda: stopping(index)):
                said[index].append(event)
        except (WhisperJobsError, torch.OutOfMemoryError) as error:
            said[index].append(error)

    threads = [threading.Thread(target=go, args=(index,)) for index in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
        assert not thread.is_alive()
    return said
