"""What a job says on a remote root: copied there now and then, at the end, and gone on with by the next start."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from jobs import recorder
from jobs.progress import LARGE, Reporter, transfer_events
from jobs.recorder import Recorder
from service.errors import StorageError
from service.storage import Storage


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(f"memory://{tmp_path}/root")


def made(root: Storage, said: io.StringIO | None = None) -> Recorder:
    return Recorder(root, Reporter(Console(file=said or io.StringIO(), width=300)))


def kept(root: Storage) -> list[str]:
    return [json.loads(line)["event"] for line in root.read_bytes("events.jsonl").decode().splitlines()]


def test_events_are_there_at_the_end_also_of_a_failure_and_a_next_start_goes_on(root: Storage) -> None:
    with pytest.raises(KeyError), made(root) as first:
        first.take({"event": "one"})
        raise KeyError
    root.write_bytes("events.jsonl", root.read_bytes("events.jsonl") + b'{"event": "cut o')
    with made(root) as second:
        second.take({"event": "two"})
        second.take({"event": "uploaded", "done": 1, "total": 2})
    assert kept(root) == ["one", "two"]


def test_they_are_copied_while_the_job_runs(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "COPY_EVERY_S", 0.05)
    with made(root) as running:
        running.take({"event": "one"})
        deadline = time.monotonic() + 20
        while not root.exists("events.jsonl"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert kept(root) == ["one"]


def test_before_the_manifest_all_of_them_are_copied_or_the_job_ends(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    with made(root, said) as running:
        running.take({"event": "one"})
        running.copy()
        assert kept(root) == ["one"]
        running.take({"event": "two"})

        def refuse(self: Storage, name: str, content: bytes) -> None:
            raise StorageError("memory://root: access is denied")

        monkeypatch.setattr(Storage, "write_bytes", refuse)
        with pytest.raises(StorageError):
            running.copy()
    assert "warning: memory://root: access is denied" in said.getvalue(), "the end does not fail on it"


def test_large_transfers_alone_are_told() -> None:
    told: list[dict[str, object]] = []
    tell = transfer_events(told.append)
    tell(1, LARGE - 1)
    tell(1, LARGE)
    assert told == [{"event": "uploaded", "done": 1, "total": LARGE}]
    screen = io.StringIO()
    Reporter(Console(file=screen, width=100)).show({"event": "uploaded", "done": 5_000_000, "total": 5_000_000})
    assert "uploading, MB 5/5" in screen.getvalue()
