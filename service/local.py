"""A job on this machine: `python -m jobs.main` as a child process, its output our output, its exit code ours."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from service.errors import EXIT_INTERRUPTED, InfeasibleError, failure_text
from service.spec.flags import CONFIG_FLAG, NO_WARNINGS_FLAG
from service.spec.job import JobSpec

JOBS_MAIN = "jobs.main"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # from linux/prctl.h
NEEDED = ("ray", "torch", "transformers", "peft")
"""Packages of the extra `jobs` without which nothing runs here."""


def run_locally(spec: JobSpec, *, overwrite: bool, output: str, debug: bool) -> int:
    """Run a checked spec with a local Ray.

    Returns:
        the job's exit code.

    Raises:
        InfeasibleError: the packages that a job needs are not installed here.
    """
    require_jobs_extra()
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as folder:
        path = Path(folder) / f"{spec.title}.json"
        path.write_text(spec.to_json(), encoding="utf-8")
        arguments = [CONFIG_FLAG, str(path), NO_WARNINGS_FLAG, *(["--overwrite"] if overwrite else [])]
        return run_module(arguments, output=output, debug=debug)


def run_module(arguments: Sequence[str], *, output: str, debug: bool, goes_on: bool = True) -> int:
    """Run the cluster's program here, on a local Ray even where RAY_ADDRESS names a cluster.

    Args:
        goes_on: whether it is a job, which leaves checkpoints.

    Raises:
        InfeasibleError: the packages that it needs are not installed here.
    """
    require_jobs_extra()
    command = [sys.executable, "-m", JOBS_MAIN, *arguments, "-o", output, *(["--debug"] if debug else [])]
    code = wait_for(command, os.environ | {"RAY_ADDRESS": "local"})
    if code > 128 and code != EXIT_INTERRUPTED:
        name = signal.Signals(code - 128).name
        text = f"the {'job' if goes_on else 'command'}'s process was ended by {name}"
        if name == "SIGKILL":
            text += ", which the system sends where memory runs out"
        if goes_on:
            text += ". The same command goes on from the last checkpoint"
        print(failure_text(text, [], code, as_json=output == "json"), file=sys.stderr)
    return code


def require_jobs_extra() -> None:
    """Refuse to start a job that cannot be imported.

    Raises:
        InfeasibleError: a package is missing.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InfeasibleError(
            f"this machine has no {', '.join(missing)}, which a job needs: "
            'pip install ".[jobs]" in the checkout of whisper-jobs '
            "(the README says how to choose the CPU or CUDA build of torch)"
        )


def wait_for(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command with our own input and output, and wait for its end, whatever signals come in between.

    Returns:
        its exit code; 128 + N where signal N has ended it.
    """
    import psutil  # comes with the packages of a job

    ours = psutil.Process()
    before = set(ours.children())
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            raise KeyboardInterrupt
        child.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    _adopt_orphans(True)
    try:
        # In a session of its own: what a terminal or supervisor sends to our whole process group would also end the
        # parts of a local Ray, with which the job is to write its last checkpoint.
        child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_end_with_parent)
        code = child.wait()
        # A job that was killed leaves parts of its Ray behind, which would take a minute or two to notice.
        for left in set(ours.children(recursive=True)) - before:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    finally:
        _adopt_orphans(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _end_with_parent() -> None:
    """Have the system send this process SIGTERM when its parent ends, however that ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _adopt_orphans(on: bool) -> None:
    """Have the system make us the parent of our descendants whose own parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
