"""Signals: the first asks the job to stop with a checkpoint, a second Ctrl-C ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from service.errors import EXIT_INTERRUPTED, InterruptedByUserError, StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ECHO_S = 0.5
"""A terminal or a supervisor may send a signal to the process group and to us: within this time it is the same one."""


class StopSignals:
    """What the signals that came in ask for. One per process, made in the main thread."""

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._when = 0.0
        self._gracefully = False

    def install(self) -> None:
        """Take the signals; again after a library has taken them for itself."""
        for number in SIGNALS:
            signal.signal(number, self._take)

    @property
    def asked(self) -> bool:
        """Whether the job was asked to stop."""
        return self._first is not None

    @contextlib.contextmanager
    def gracefully(self) -> Iterator[None]:
        """In here a signal only sets `asked`, and the work is to end by itself; elsewhere it ends it by an error."""
        if self.asked:
            raise self.error("stopped")
        self._gracefully = True
        try:
            yield
        finally:
            self._gracefully = False

    def error(self, text: str) -> StoppedError:
        """The error that goes with the signal that came."""
        kind = InterruptedByUserError if self._first is signal.SIGINT else StoppedError
        return kind(text)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first, self._when = signal.Signals(number), time.monotonic()
            if not self._gracefully:
                raise self.error(f"stopped ({self._first.name}). The same command goes on with what is done")
        elif number == signal.SIGINT and time.monotonic() - self._when > _ECHO_S:
            os.write(2, b"\nerror: ended at once. The same command goes on from the last checkpoint\n")
            # A local Ray ends with the process that started it; nothing here may wait for one that does not answer.
            os._exit(EXIT_INTERRUPTED)
