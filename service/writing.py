"""What it means that a file cannot be written: a full or read-only disk is an error of its own, a wrong place one of
the input."""

from __future__ import annotations

import contextlib
import errno
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from service.errors import Fault, InputError, StorageError, WhisperJobsError
from service.spec import look

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_ROOM = FULL | {errno.EROFS, errno.EIO}
"""What the system says of a disk that takes nothing, wherever on it a file is to be."""


def unwritable(error: OSError, where: str, way_out: str, path: Path | None = None) -> WhisperJobsError:
    """What the user should see of a file that cannot be written.

    Args:
        error: the system's.
        where: what the place is called: an option, or the path itself.
        way_out: such as "give another folder".
        path: shown behind an option.
    """
    if error.errno in FULL:
        way_out = f"make room, or {way_out}"
    message = f"cannot be written ({error.strerror or error}); {way_out}"
    fault = Fault(where, message) if path is None else Fault(where, message, str(path))
    return StorageError(str(fault)) if error.errno in NO_ROOM else InputError([fault])


def understood(error: BaseException) -> BaseException:
    """What the system says of a disk that takes nothing as an error of ours; any other as it is."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        drop_output(error)
        way_out = "make room" if error.errno in FULL else "write to another disk"
        return StorageError(f"results cannot be written ({error.strerror or error}); {way_out}")
    return error


def drop_output(error: BaseException) -> None:
    """Give up what the standard output has not taken: the interpreter, at its end, would fail on it once more."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        with contextlib.suppress(OSError):
            sys.stdout.close()


@contextlib.contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Write to a path inside this context.

    Raises:
        StorageError: the disk is full or read-only.
        InputError: nothing can be written at this place.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(error, str(path), way_out) from error


def require_folder(option: str, folder: Path) -> None:
    """Try whether files can be written to a folder that an option names; nothing stays of it.

    Raises:
        StorageError: the disk is full or read-only.
        InputError: it is no folder and cannot become one, or takes no file.
    """
    if look.is_file(folder):
        raise InputError([Fault(option, "is a file; give a folder", str(folder))])
    _require(option, folder, folder, "give another folder")


def require_file(option: str, path: Path) -> None:
    """Try whether a file that an option names can be written; nothing is changed.

    Raises:
        StorageError: the disk is full or read-only.
        InputError: it is no file, or nothing can be written beside it.
    """
    if look.exists(path) and not look.is_file(path):
        # What is written aside would take the place of a device, too.
        what = "a folder" if look.is_dir(path) else "no ordinary file"
        raise InputError([Fault(option, f"is {what}; give a file", str(path))])
    _require(option, path, path.parent, "give another file")


def _require(option: str, path: Path, folder: Path, way_out: str) -> None:
    blocked = next(filter(look.exists, (folder, *folder.parents)), folder)
    if look.is_file(blocked):
        raise InputError([Fault(option, f"lies below {blocked}, a file; {way_out}", str(path))])
    made = [place for place in (folder, *folder.parents) if not look.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
            file.flush()
    except OSError as error:
        raise unwritable(error, option, way_out, path) from error
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A place beside a file, which takes the file's place when what is written there is whole."""
    beside = path.with_name(f".{path.name}.new")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
