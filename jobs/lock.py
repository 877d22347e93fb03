"""One run at a time under a root."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from service.errors import Fault, InputError, StorageError
from service.storage import LOCK, Storage

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def sole_run(root: Storage) -> Iterator[None]:
    """Hold a root for this process. The system lets go of it when the process ends, however it ends.

    It works across machines where their shared file system has locks (NFS 4, Lustre with flock, ...).

    Raises:
        InputError: another run holds it, or it cannot be written.
    """
    path = root.local(LOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(path)
    except BlockingIOError:
        holder = _holder(path)
        way_out = f"another run is at work here{holder}; wait for its end, stop it, or give another outdir"
        raise InputError([Fault(root.path(), way_out)]) from None
    except OSError as error:
        raise _not_writable(root, error) from error
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


def _not_writable(root: Storage, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{root.path()}: the disk is full ({error.strerror}); make room and try again")
    reason = error.strerror or str(error)
    return InputError([Fault(root.path(), f"cannot be written ({reason}); give another outdir or storage.uri")])
