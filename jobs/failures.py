"""What the libraries raise, told apart: each way in which a job fails has an error and an exit code of its own."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from service.errors import (
    Fault,
    HungError,
    InputError,
    InputLostError,
    JobFailedError,
    NotFoundError,
    OutOfMemoryError,
    StorageError,
    WhisperJobsError,
    WorkerLostError,
)
from service.writing import FULL, NO_ROOM

_NOT_WRITABLE = NO_ROOM | {errno.EACCES, errno.EPERM, errno.ENOTDIR}
# The native writers of safetensors, Arrow and torch raise errors of their own, with the system's text in them.
_NO_SPACE = ("no space left on device", "disk quota exceeded", "read-only file system")
_NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "cannot allocate memory")
_COLLECTIVE = ("gloo", "nccl", "processgroup", "connection closed by peer", "connection reset by peer", "tcpstore")
_TIMED_OUT = ("timed out", "timeout")

GO_ON = "The same command goes on from the last checkpoint"


def explain(error: BaseException) -> WhisperJobsError:
    """The error that the user should see: ours as it is, any other by what it means."""
    if isinstance(error, WhisperJobsError):
        return error
    text = str(error).lower()
    short = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        way_out = "lower training.per_dev_batch (and raise training.grad_accum; or set `per_dev_batch: auto`, with "
        way_out += "grad_accum the clips of a step) or evaluation.batch_size, or set engine.gradient_checkpointing"
        return OutOfMemoryError(f"{short}; {way_out}. {GO_ON}")
    if any(words in text for words in _NO_SPACE) or (isinstance(error, OSError) and error.errno in _NOT_WRITABLE):
        return StorageError(f"results cannot be written ({first_line(error)}); make room or allow it. {GO_ON}")
    if isinstance(error, RuntimeError) and any(words in text for words in _COLLECTIVE):
        if any(words in text for words in _TIMED_OUT):
            return HungError(f"a worker did not answer within engine.timeout_s ({first_line(error)}). {GO_ON}")
        return WorkerLostError(f"a worker lost its connection to another ({first_line(error)}). {GO_ON}")
    return JobFailedError(short)


def explain_alone(error: BaseException) -> WhisperJobsError:
    """The same for a command that leaves no checkpoint."""
    found = explain(error)
    return found if found is error else type(found)(str(found).removesuffix(f". {GO_ON}"))


@contextlib.contextmanager
def inputs_that_were_there() -> Iterator[None]:
    """What is read here was read before: that it cannot be read now is no fault of the spec.

    Raises:
        InputLostError: a clip or the base model has gone.
    """
    try:
        yield
    except (InputError, NotFoundError) as error:
        raise InputLostError(
            f"{error}; it was there when the job checked it. Put it back where every node sees it. {GO_ON}"
        ) from error


def root_not_writable(root: str, error: OSError) -> WhisperJobsError:
    """What a root that takes no file at a job's start means: bad input, or a disk that is full."""
    if error.errno in FULL:
        return StorageError(f"{root}: the disk is full ({error.strerror}); make room and try again")
    reason = error.strerror or str(error)
    return InputError([Fault(root, f"cannot be written ({reason}); give another outdir or storage.uri")])


def first_line(error: BaseException) -> str:
    """The first line of an error's message, 300 characters at most."""
    lines = [line for line in str(error).strip().split("\n") if line.strip()]
    return lines[0][:300] if lines else "no message"
