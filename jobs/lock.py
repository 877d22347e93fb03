"""One run at a time under a root."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from jobs.failures import root_not_writable
from jobs.remote_lock import HeldError, held
from service.errors import Fault, InputError
from service.storage import LOCK, Storage

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def sole_run(root: Storage, tell: Callable[[str], None] = lambda text: None) -> Iterator[Callable[[], None]]:
    """Hold a root for this process.

    Of a folder the system lets go when the process ends, however it ends. That works across machines where their shared
    file system has locks (NFS 4, Lustre with flock, ...). On object storage see jobs/remote_lock.py.

    Args:
        root: the root.
        tell: takes a line for whoever watches.

    Yields:
        a function that raises StorageError where another run has taken the root over meanwhile.

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    if root.is_local:
        with _held_folder(root):
            yield lambda: None
        return
    with contextlib.ExitStack() as stack:
        try:
            check = stack.enter_context(held(root, tell))
        except HeldError as holder:
            raise _refused(root, str(holder)) from None
        yield check


@contextlib.contextmanager
def _held_folder(root: Storage) -> Iterator[None]:
    path = root.local(LOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(path)
    except BlockingIOError:
        raise _refused(root, _holder(path)) from None
    except OSError as error:
        raise root_not_writable(root.path(), error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _open_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one that held it may just have deleted it: then the lock is on a file that has no name any more.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                break
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            break  # a file system without locks: better to run than to refuse
        os.close(handle)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(me).encode(), 0)
    return handle


def _holder(path: Path) -> str:
    try:
        me = json.loads(path.read_text())
        return f" (process {me['pid']} on {me['host']}, since {me['since']})"
    except (OSError, ValueError, KeyError):
        return ""


def _refused(root: Storage, holder: str) -> InputError:
    way_out = f"another run is at work here{holder}; wait for its end, stop it, or give another outdir"
    return InputError([Fault(root.path(), way_out)])
