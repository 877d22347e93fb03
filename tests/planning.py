"""Jobs in which faults are planned at exact moments."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import JOB, TIMEOUT_S, Finished, start

INJECT = Path(__file__).parent / "faults/inject"


@dataclass
class Faults:
    """Plans a fault for the next job; each fires once, in whichever process reaches its moment first."""

    folder: Path
    address: str

    def plan(self, point: str, action: str, count: int = 1, rank: int | None = None) -> None:
        """Have `action` done when a process reaches `point` for the `count`th time (in the worker of that rank)."""
        self.clear()
        content: dict[str, Any] = {"point": point, "action": action, "count": count}
        (self.folder / "plan.json").write_text(json.dumps(content | ({} if rank is None else {"rank": rank})))

    def clear(self) -> None:
        """No fault."""
        for path in self.folder.iterdir():
            path.unlink()

    @property
    def pid(self) -> int:
        """Of the process in which the moment came."""
        return int(json.loads((self.folder / "fired").read_text())["pid"])

    @property
    def fired(self) -> bool:
        """Whether the moment came."""
        return (self.folder / "fired").exists() and bool((self.folder / "fired").read_text())

    def variables(self) -> dict[str, str]:
        """What processes need to know."""
        paths = [str(INJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"WHISPER_JOBS_FAULTS": str(self.folder), "PYTHONPATH": os.pathsep.join(paths)}

    def go(self) -> None:
        """Let a process go on that waits."""
        (self.folder / "go").touch()

    def start(
        self, *arguments: Any, local: bool = False, program: tuple[str, ...] = JOB, **variables: str
    ) -> subprocess.Popen[str]:
        """Start a job on the cluster, or on a local Ray of its own."""
        cluster = None if local or program != JOB else self.address
        every = self.variables() | variables
        process = start(*arguments, cluster=cluster, variables=every, program=program, start_new_session=True)
        (self.folder / "driver.pid").write_text(str(process.pid))
        return process

    def run(self, *arguments: Any, local: bool = False, program: tuple[str, ...] = JOB, **variables: str) -> Finished:
        """Run a job to its end."""
        return self.end(self.start(*arguments, local=local, program=program, **variables))

    def end(self, process: subprocess.Popen[str]) -> Finished:
        """Wait for a job's end."""
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        return Finished(process.returncode, stdout, stderr, 0.0)
