"""What several trials need at about the same time, made by the first that asks for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Once(Generic[Made]):
    """Things by their keys, the newest ones kept.

    Args:
        kept: how many.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._made: OrderedDict[Hashable, Future[Made]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What lies under a key, made now if there is nothing; others that ask meanwhile wait for it."""
        future = Future[Made]()
        with self._lock:
            found = self._made.setdefault(key, future)
            while len(self._made) > self._kept:
                self._made.popitem(last=False)
        if found is future:
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001  # of whoever waits for it
                with self._lock:
                    self._made.pop(key, None)
                future.set_exception(error)
        return found.result()
