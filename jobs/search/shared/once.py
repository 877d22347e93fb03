"""What several trials need at about the same time, made by the first that asks for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

Made = TypeVar("Made")

_ALWAYS_KEPT = 2
"""Of whatever size."""


class Once(Generic[Made]):
    """Things by their keys, the newest ones kept.

    Args:
        kept: how many at most.
        most_bytes: that they may take; None: as many as they take.
        bytes_of: what one takes.
    """

    def __init__(
        self, kept: int, most_bytes: int | None = None, bytes_of: Callable[[Made], int] = lambda made: 0
    ) -> None:
        self._kept, self._most_bytes, self._bytes_of = kept, most_bytes, bytes_of
        self._made: OrderedDict[Hashable, Future[Made]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._made)

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What lies under a key, made now if there is nothing; others that ask meanwhile wait for it."""
        future = Future[Made]()
        with self._lock:
            found = self._made.setdefault(key, future)
        if found is future:
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001  # of whoever waits for it
                with self._lock:
                    self._made.pop(key, None)
                future.set_exception(error)
            else:
                self._let_go()
        return found.result()

    def clear(self) -> None:
        """Keep nothing of what there is."""
        with self._lock:
            self._made.clear()

    def _let_go(self) -> None:
        """Of the oldest, what is too much."""
        with self._lock:
            taken = {key: self._bytes_of(each.result()) for key, each in self._made.items() if each.done()}
            most = sum(taken.values()) if self._most_bytes is None else self._most_bytes
            while len(self._made) > self._kept or (sum(taken.values()) > most and len(self._made) > _ALWAYS_KEPT):
                key, _ = self._made.popitem(last=False)
                taken.pop(key, None)
