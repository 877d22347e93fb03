"""Checkpoints on a remote root: whole ones come back, torn and altered ones are named and passed over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from jobs.train.store import SEAL, CheckpointStore
from service.storage import Storage
from service.storage.cache import KEPT_DAYS, ROOTS


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "cache"))
    return Storage(f"memory://{tmp_path}/run")


def save(store: CheckpointStore, step: int) -> None:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter/weights").write_text(f"weights {step}")
        (folder / "state.pt").write_text(f"state {step}")

    store.save(step, write)


def test_the_last_ones_are_kept_and_come_back(root: Storage) -> None:
    store = CheckpointStore(root, keep=2)
    for step in (2, 4, 10):
        save(store, step)
    assert store.steps() == [4, 10]
    assert store.newest() == 10
    assert (store.folder(10) / "adapter/weights").read_text() == "weights 10"
    assert not root.exists("checkpoints/checkpoint-2")


@pytest.mark.parametrize("fault", ["no seal", "altered", "missing", "cut off"])
def test_a_torn_one_is_named_and_the_one_before_is_taken(root: Storage, fault: str) -> None:
    told: list[str] = []
    store = CheckpointStore(root, 5, told.append)
    for step in (2, 4):
        save(store, step)
    name = f"checkpoints/checkpoint-4/{SEAL if fault == 'no seal' else 'state.pt'}"
    root.remove(name)
    if fault in ("altered", "cut off"):
        root.write_text(name, "STATE 4" if fault == "altered" else "sta")
    assert store.newest() == 2
    assert len(told) == 1
    assert told[0].startswith("checkpoint 4 is passed over: ")


def test_copies_that_nobody_asked_for_in_a_week_are_deleted_and_nothing_else(root: Storage, tmp_path: Path) -> None:
    mine = tmp_path / "cache/photographs"
    old = tmp_path / "cache" / ROOTS / "0123456789abcdef"
    for folder in (mine, old):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
        long_ago = time.time() - (KEPT_DAYS + 1) * 86_400
        os.utime(folder, (long_ago, long_ago))
    root.write_text("a.txt", "x")
    copy = root.fetch("a.txt")
    assert (mine.exists(), old.exists(), copy.exists()) == (True, False, True)
