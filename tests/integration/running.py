"""Jobs as a user runs them: `python -m jobs.main` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import environment

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 280


@dataclass
class Finished:
    """A job that has ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float

    def json(self) -> Any:
        """What it printed as its result."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout)

    def error(self) -> Any:
        """What it printed as its failure; the last line of stderr."""
        assert self.code != 0
        assert self.stdout == ""
        assert "Traceback" not in self.stderr
        return json.loads(self.stderr.strip().split("\n")[-1])


def command(*arguments: Any) -> list[str]:
    """The command line of a job."""
    return [sys.executable, "-m", "jobs.main", *map(str, arguments)]


def start(*arguments: Any, cluster: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a job on a cluster, or on a local Ray of its own."""
    variables = environment() | ({"RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"} if cluster else {})
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run(*arguments: Any, cluster: str | None = None) -> Finished:
    """Run a job to its end."""
    started = time.monotonic()
    process = start(*arguments, cluster=cluster)
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return Finished(process.returncode, stdout, stderr, time.monotonic() - started)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Look until a condition holds; a process that ends before it is an error."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
