"""What a job says, kept in events.jsonl: written as it comes on a local root, copied to a remote one now and then."""

from __future__ import annotations

import contextlib
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

from jobs.progress import Reporter
from service import artifacts
from service.errors import NotFoundError, StorageError
from service.storage import Storage
from service.storage.retry import START_PATIENCE_S

COPY_EVERY_S = 20.0
"""How often a remote root gets what was said."""

_ONLY_SHOWN = ("transcribed", "rows", "uploaded", "trial_step")
"""Events that only move a bar."""


class Recorder:
    """Keeps events: shown to whoever watches, and in events.jsonl. At its end as a context all are kept.

    Args:
        root: the run's root; what an earlier run has said there is gone on with.
        reporter: shows them.
    """

    def __init__(self, root: Storage, reporter: Reporter) -> None:
        self._root, self._reporter = root, reporter
        self._lost = False
        self.tracebacks: list[str] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if root.is_local:
            self._path = root.local(artifacts.EVENTS)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="whisper-jobs-")
            self._path = Path(self._scratch.name) / artifacts.EVENTS
            with contextlib.suppress(NotFoundError):
                self._path.write_bytes(root.read_bytes(artifacts.EVENTS))
        _end_with_a_line(self._path)
        self._copied = self._size()
        self._copying, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> Recorder:
        if self._scratch:
            threading.Thread(target=self._copy_now_and_then, daemon=True, name="recorder").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._scratch:
            self._try_to_copy()
            self._scratch.cleanup()

    def take(self, event: dict[str, Any]) -> None:
        """Keep and show one event."""
        self._reporter.show(event)
        if event["event"] == "traceback":
            self.tracebacks.append(event["text"])
        if event["event"] not in _ONLY_SHOWN and event.get("logged", True):
            self.keep({key: value for key, value in event.items() if key != "logged"})

    def keep(self, event: dict[str, Any]) -> None:
        """Keep an event without showing it."""
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(event, ensure_ascii=False) + "\n")
        except OSError as error:
            self._warn(f"{self._path} cannot be written ({error.strerror or error})")

    def keep_once(self, events: list[dict[str, Any]]) -> None:
        """Keep events of before without showing them, but for those that are kept already."""
        there = set(self._path.read_text(encoding="utf-8").split("\n")) if self._path.exists() else set()
        for event in events:
            if json.dumps(event, ensure_ascii=False) not in there:
                self.keep(event)

    def copy(self, root: Storage | None = None) -> None:
        """Have a remote root hold all that was said so far.

        Raises:
            StorageError: it does not take it.
        """
        with self._copying:
            if self._scratch and self._size() != self._copied:
                content = self._path.read_bytes()  # more may be said while it is on its way
                (root or self._root).write_bytes(artifacts.EVENTS, content)
                self._copied = len(content)

    def _copy_now_and_then(self) -> None:
        while not self._ended.wait(COPY_EVERY_S):
            self._try_to_copy()

    def _try_to_copy(self) -> None:
        try:
            self.copy(Storage(self._root.uri, patience_s=START_PATIENCE_S))
        except StorageError as error:
            self._warn(str(error))

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _warn(self, text: str) -> None:
        """Say once that events are lost; the job itself ends on it where it writes what it needs."""
        if not self._lost:
            self._reporter.show({"event": "notice", "level": "warning", "text": text})
        self._lost = True


def _end_with_a_line(path: Path) -> None:
    """Cut off what a process that was killed has left of a line."""
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
