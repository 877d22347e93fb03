"""Waiting until the cluster has room for a job's workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from jobs.cluster.placement import Wish
from jobs.cluster.resources import Resources, fitting, in_words, infeasible, missing_resources, resources_for
from service.spec.job import JobSpec

ELASTIC_SHARE = 0.1
"""How much of `resources.wait_s` an elastic job waits for room for all of its workers."""

_POLL_S = 0.2
_PLACING_S = 5.0
"""What Ray takes at most to place workers where there is room."""
_TRYING_S = 3.0
"""The same, for each number of workers that is tried."""


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
            raise infeasible(needed, missing, "this machine" if local else "the cluster")
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
                raise infeasible(needed, missing, "the cluster")
            if not told and (missing or waited_s >= _PLACING_S):
                told = True
                tell(f"waiting for the cluster to offer {missing or in_words(needed)}, {wait_s:g} s at most")
            if needed != (needed := resources_for(spec)):  # a node with GPUs has come, or has gone
                wish.withdraw()
                wish = Wish(needed)
    finally:
        wish.withdraw()
    if not needed.gpus and spec.resources.gpus_per_worker is None:
        tell("the cluster has no GPU: training on CPUs (resources.gpus_per_worker: 1 waits for GPUs)")
    return needed


def _fewer(spec: JobSpec, needed: Resources, check: Callable[[], None]) -> Resources | None:
    """As many workers as there is room for, at least `min_workers` of them; None: there is not."""
    least, most = spec.resources.min_workers or 1, min(needed.workers - 1, fitting(needed))
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
