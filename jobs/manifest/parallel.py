"""A function over a stream of items, in processes, in order, holding no more of the stream than is under way."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 64
SMALL = 512
"""So few items are done here and now: starting processes would take longer."""


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, processes: int, small: int = SMALL
) -> Iterator[Result]:
    """Results in the order of the items.

    Args:
        function: can be pickled; its items and results too.
        items: may be endless: at most 4 chunks per process are read ahead.
        processes: 1: everything in this process.
        small: up to so many items everything is done in this process as well.
    """
    stream = iter(items)
    if processes <= 1:
        yield from map(function, stream)
        return
    head = list(itertools.islice(stream, small))
    if len(head) < small:
        yield from map(function, head)
        return
    chunks = _chunks(itertools.chain(head, stream))
    # Not fork: libraries that the parent has loaded keep threads and locks that do not survive it.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver"))
    waiting: deque[Future[list[Result]]] = deque()
    try:
        for chunk in itertools.islice(chunks, 4 * processes):
            waiting.append(pool.submit(_work, function, chunk))
        while waiting:
            results = waiting.popleft().result()
            waiting.extend(pool.submit(_work, function, chunk) for chunk in itertools.islice(chunks, 1))
            yield from results
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(itertools.islice(items, CHUNK)):
        yield chunk


def _work(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]
