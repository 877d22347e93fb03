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

from clusters import RayCluster
from engine import environment

from service.spec.job import JobSpec

ROOT = Path(__file__).parents[1]
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


JOB = ("-m", "jobs.main")
CLI = ("-c", "from service.cli.main import main; main()")


def command(*arguments: Any, program: tuple[str, ...] = JOB) -> list[str]:
    """The command line of a job, or of the client."""
    return [sys.executable, *program, *map(str, arguments)]


def start(
    *arguments: Any,
    cluster: str | RayCluster | None = None,
    variables: dict[str, str] | None = None,
    program: tuple[str, ...] = JOB,
    **options: Any,
) -> subprocess.Popen[str]:
    """Start a job on a cluster (an address alone: one without authentication), or on a local Ray of its own."""
    address: dict[str, str] = {}
    if isinstance(cluster, RayCluster):
        address = cluster.variables()
    elif cluster:
        address = {"RAY_ADDRESS": cluster, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(
        command(*arguments, program=program),
        cwd=ROOT,
        env=environment() | address | (variables or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def run(
    *arguments: Any,
    cluster: str | RayCluster | None = None,
    variables: dict[str, str] | None = None,
    program: tuple[str, ...] = JOB,
) -> Finished:
    """Run a job, or a command of the client, to its end."""
    started = time.monotonic()
    process = start(*arguments, cluster=cluster, variables=variables, program=program)
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


def write(spec: JobSpec, folder: Path) -> Path:
    """The spec as a file."""
    path = folder / "spec.json"
    path.write_text(spec.to_json())
    return path


def processes_of(session: int) -> list[str]:
    """Command lines of the processes in a session that are still there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((process / "cmdline").read_text().replace("\0", " ")[:100])
        except OSError:
            continue
    return found


def steps_of(root: Path, kind: str) -> list[int]:
    """Steps of the events of one kind so far; the job may be in the middle of a line."""
    path = root / "events.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [event["step"] for event in map(json.loads, lines) if event["event"] == kind and "step" in event]
