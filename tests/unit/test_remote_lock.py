"""A root on object storage is held by one run at a time; a holder that has ended is told from one that lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from objectstore import BUCKET, Server

from jobs import remote_lock
from jobs.lock import sole_run
from service.errors import InputError, StorageError
from service.storage import LOCK, Storage

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from jobs.lock import sole_run
from service.storage import Storage
with sole_run(Storage(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ELSEWHERE = {"host": "node-7", "pid": 4711, "since": "2026-11-22T12:00:00+00:00", "system": "another", "token": "x"}


@pytest.fixture
def root(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in server.writer.variables(server.endpoint).items():
        monkeypatch.setenv(name, value)
    return Storage(f"s3://{BUCKET}/lock{tmp_path}")


def lie(root: Storage, holder: dict[str, Any]) -> None:
    """Leave a lock as another machine would."""
    root.write_json(LOCK, holder | {"renewed": datetime.now(UTC).isoformat()})


def hold(root: Storage) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, root.uri], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_while_one_holds_it_another_is_refused_by_name_and_a_killed_one_no_longer(root: Storage) -> None:
    process = hold(root)
    started = time.monotonic()
    refused = rf"another run is at work here \(process {process.pid} on .*, since 2"
    with pytest.raises(InputError, match=refused) as caught, sole_run(root):
        pass
    assert caught.value.exit_code == 2
    assert time.monotonic() - started < 5, "a process of this machine is looked at, not waited for"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert root.exists(LOCK)
    with sole_run(root):
        pass
    assert not root.exists(LOCK)


def test_the_lock_goes_with_its_holder_and_is_no_file_of_the_run(root: Storage) -> None:
    with pytest.raises(KeyError), sole_run(root):
        assert root.exists(LOCK)
        root.sweep(resumable=True)
        assert root.exists(LOCK), "sweeping leaves it"
        assert list(root.files()) == []
        raise KeyError
    assert not root.exists(LOCK)


def test_one_elsewhere_that_shows_that_it_lives_is_waited_for_and_then_refused(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_lock, "_LOOK_EVERY_S", 0.1)
    lie(root, ELSEWHERE)
    told: list[str] = []
    renewed = threading.Timer(0.5, lie, (root, ELSEWHERE))
    renewed.start()
    with (
        pytest.raises(InputError, match=r"another run is at work here \(process 4711 on node-7"),
        sole_run(root, told.append),
    ):
        pass
    renewed.join()
    assert len(told) == 1
    assert "waiting" in told[0]


def test_one_elsewhere_that_no_longer_renews_it_is_taken_over(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(remote_lock, "STALE_S", 2.0)
    lie(root, ELSEWHERE)
    with sole_run(root) as check:
        check()
        assert json.loads(root.read_bytes(LOCK))["pid"] == os.getpid()


def test_a_number_that_another_process_has_got_since_is_no_sign_of_life(root: Storage) -> None:
    mine = remote_lock._identity()
    lie(root, mine | {"token": "x", "began": "1"})
    with sole_run(root):
        pass


def test_a_holder_renews_its_lock_and_learns_when_it_has_lost_it(
    root: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_lock, "RENEW_S", 0.1)

    def until(condition: Any) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with sole_run(root) as check:
        first = root.read_bytes(LOCK)
        until(lambda: root.read_bytes(LOCK) != first)
        check()
        lie(root, ELSEWHERE)

        def lost() -> bool:
            try:
                check()
            except StorageError as error:
                return "another run has taken this root over" in str(error)
            return False

        until(lost)
    assert json.loads(root.read_bytes(LOCK))["host"] == "node-7", "it is the other's to give back"


def test_of_many_that_find_a_stale_lock_one_takes_it(root: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(remote_lock, "STALE_S", 4.0)
    lie(root, ELSEWHERE)
    lie_until = datetime.now(UTC) + timedelta(seconds=5)
    while datetime.now(UTC) < lie_until:
        time.sleep(0.1)
    inside, most = [0], [0]

    def run() -> None:
        try:
            with sole_run(root):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.3)
                inside[0] -= 1
        except InputError:
            pass

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
