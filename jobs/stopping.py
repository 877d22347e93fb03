"""Signals: the first asks the job to stop with a checkpoint, a second Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import psutil

from jobs.failures import GO_ON
from service.errors import EXIT_INTERRUPTED, InterruptedByUserError, StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ECHO_S = 0.5
"""A terminal or a supervisor may send a signal to the process group and to us: within this time it is the same one."""


class StopSignals:
    """What the signals that came in ask for; only the main thread may `install` it."""

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._when = 0.0
        self._watched: list[Callable[[], None]] = []

    def install(self) -> None:
        """Take the signals; again after a library has taken them for itself."""
        for number in SIGNALS:
            signal.signal(number, self._take)

    def ask(self) -> None:
        """Ask as a SIGTERM does: for a training that hears of its end in another way than by signals."""
        self._first = self._first or signal.SIGTERM

    @property
    def asked(self) -> bool:
        """Whether the job was asked to stop."""
        return self._first is not None

    def check(self) -> None:
        """End work that leaves nothing half-done, where the job was asked to stop.

        Raises:
            StoppedError: it was.
        """
        self.check_watched()
        if self._first is not None:
            raise self.error(f"stopped ({self._first.name}). The same command goes on with what is done")

    def watch(self, check: Callable[[], None]) -> None:
        """Have something else looked at too, whose error ends the work."""
        self._watched.append(check)

    def check_watched(self) -> None:
        """Look at what is watched; raises what it raises."""
        for check in self._watched:
            check()

    def error(self, text: str) -> StoppedError:
        """The error that goes with the signal that came."""
        kind = InterruptedByUserError if self._first is signal.SIGINT else StoppedError
        return kind(text)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            # No error from here: Ray's calls neither end for it nor pass it on whole.
            self._first, self._when = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when > _ECHO_S:
            os.write(2, f"\nerror: ended at once. {GO_ON}\n".encode())
            # A local Ray is made of our descendants. Nothing here may wait for one that does not answer.
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            os._exit(EXIT_INTERRUPTED)
