"""A root is held by one process at a time, for as long as that process lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.lock import sole_run
from service.errors import InputError
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


@pytest.fixture
def root(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def hold(root: Storage) -> subprocess.Popen[str]:
    """Another process that holds the root."""
    command = [sys.executable, "-c", HOLDER, root.path()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_while_one_holds_it_another_is_refused_by_name(root: Storage) -> None:
    process = hold(root)
    refused = rf"another run is at work here \(process {process.pid} on .*, since 2"
    with pytest.raises(InputError, match=refused), sole_run(root):
        pass
    process.kill()
    process.communicate()


def test_a_holder_that_is_killed_holds_it_no_longer(root: Storage) -> None:
    process = hold(root)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (root.local() / LOCK).exists()
    with sole_run(root):
        pass
    assert not (root.local() / LOCK).exists()


def test_the_lock_goes_with_its_holder_and_is_no_file_of_the_run(root: Storage) -> None:
    for _ in range(2):
        with sole_run(root):
            assert list(root.files()) == []
            assert (root.local() / LOCK).exists()
        assert list(root.local().iterdir()) == []
    with pytest.raises(KeyError), sole_run(root):
        raise KeyError
    assert list(root.local().iterdir()) == []


def test_many_at_once_take_turns_and_never_two_hold_it(root: Storage) -> None:
    code = """
import sys, time
from pathlib import Path
from jobs.lock import sole_run
from service.errors import InputError
from service.storage import Storage
root, held = Storage(sys.argv[1]), 0
while held < 20:
    try:
        with sole_run(root):
            inside = root.local("inside")
            with open(inside, "x"):
                pass
            inside.unlink()
            held += 1
    except InputError:
        pass
"""
    command = [sys.executable, "-c", code, root.path()]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    ended = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ended


def test_a_root_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"), sole_run(Storage(str(tmp_path / "file/run"))):
        pass
