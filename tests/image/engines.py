"""What the tests of the image build and run it with: docker or podman as the machine has them.

Where no registry is in reach: podman and buildah with a storage of their own, and a base of Debian's packages.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pip_settings import PipSettings

ROOT = Path(__file__).parents[2]
BASE = next(
    line.partition("=")[2]
    for line in (ROOT / "docker/Dockerfile").read_text().splitlines()
    if line.startswith("ARG BASE=")
)
PLACE = Path(os.environ.get("WHISPER_JOBS_IMAGE_TEST", "/var/tmp/whisper-jobs-image-test"))
"""Where images and layers stay between two runs, if the storage is ours; it may be deleted at any time."""

LOCKED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")
SCRATCH = ("--tmpfs=/tmp", "--volume=/cache")


class EngineError(Exception):
    """Why nothing can be built and run here."""


@dataclass
class Engine:
    """docker or podman, with what they need in their environment."""

    name: str
    variables: dict[str, str] = field(default_factory=dict)
    own_storage: bool = False

    @classmethod
    def find(cls) -> Engine:
        """The engine of this machine, with the base in its storage.

        Raises:
            EngineError: there is none, or it can neither pull the base nor make one.
        """
        if _runs("docker", "version"):
            return cls("docker")
        if not shutil.which("podman"):
            raise EngineError("neither a docker that works nor podman is there")
        engine = cls("podman")
        if engine.run("image", "exists", BASE, check=False).returncode == 0:
            return engine
        if engine.run("pull", "--quiet", BASE, check=False, timeout_s=300).returncode == 0:
            return engine
        return cls._without_a_registry()

    @classmethod
    def _without_a_registry(cls) -> Engine:
        if os.geteuid() != 0:
            raise EngineError(f"{BASE} cannot be pulled, and a base of Debian's packages wants root")
        if missing := [one for one in ("debootstrap", "buildah", "runc") if not shutil.which(one)]:
            raise EngineError(f"{BASE} cannot be pulled, and a base of Debian's packages wants {', '.join(missing)}")
        engine = cls("podman", _configuration(PLACE), own_storage=True)
        if engine.run("image", "exists", BASE, check=False).returncode != 0:
            script = Path(__file__).with_name("local_base.sh")
            made = engine.command([str(script), BASE], check=False, timeout_s=900)
            if made.returncode != 0:
                raise EngineError(f"{BASE} can be neither pulled nor made of Debian's packages: {made.stderr.strip()}")
        return engine

    def command(
        self,
        line: list[str],
        *,
        check: bool = True,
        timeout_s: float = 120,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the environment of the engine."""
        ended = subprocess.run(
            line,
            cwd=ROOT,
            env={**os.environ, **self.variables, **(variables or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check:
            assert ended.returncode == 0, f"{' '.join(line)}\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
        return ended

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine."""
        return self.command([self.name, *arguments], check=check, timeout_s=timeout_s)

    def build(
        self, tag: str, pip: PipSettings, *arguments: str, check: bool = True, timeout_s: float = 3000
    ) -> subprocess.CompletedProcess[str]:
        """Build the image as a user does, with docker/build.sh."""
        line = [str(ROOT / "docker/build.sh"), f"--tag={tag}", *pip.arguments(), *arguments]
        if self.own_storage:
            line += ["--engine=buildah", "--isolation=chroot"]
        else:
            line += [f"--engine={self.name}"]
        ended = self.command(line, check=check, timeout_s=timeout_s)
        if self.own_storage:  # what no build of the last week has used
            self.run("image", "prune", "--force", "--filter=until=168h", timeout_s=600)
        return ended

    def once(
        self, image: str, *command: str, options: tuple[str, ...] = (), check: bool = True, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a container that is locked as those of compose.yaml are, and goes with it."""
        return self.run("run", "--rm", *LOCKED, *SCRATCH, *options, image, *command, check=check, timeout_s=timeout_s)

    def knows_health(self) -> bool:
        """Whether a container can wait until another is well."""
        version = re.search(r"(\d+)\.(\d+)", self.run("--version").stdout)
        return self.name == "docker" or (version is not None and (int(version[1]), int(version[2])) >= (4, 6))

    def inspect(self, name: str) -> dict[str, Any]:
        """What the engine knows of a container or an image."""
        found: dict[str, Any] = json.loads(self.run("inspect", name).stdout)[0]
        return found

    def logs(self, container: str) -> str:
        """What a container has said."""
        ended = self.run("logs", container, check=False)
        return ended.stdout + ended.stderr

    def layers(self, image: str) -> list[tuple[int, str]]:
        """The size of each layer in bytes, and the step that made it, the first one first."""
        if self.name == "podman":
            listed = json.loads(self.run("history", "--format=json", image).stdout)
            found = [(int(entry["size"]), str(entry["CreatedBy"])) for entry in listed]
        else:
            lines = self.run(
                "history", "--no-trunc", "--human=false", "--format={{.Size}}\t{{.CreatedBy}}", image
            ).stdout
            found = [(int(size), step) for size, _, step in (line.partition("\t") for line in lines.splitlines())]
        return [(size, step) for size, step in reversed(found) if size]


def _runs(*line: str) -> bool:
    try:
        return subprocess.run(line, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _configuration(place: Path) -> dict[str, str]:
    """Write the configuration of a storage apart; returns the variables that name it."""
    place.mkdir(parents=True, exist_ok=True)
    storage, containers = place / "storage.conf", place / "containers.conf"
    storage.write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{place}/storage"\nrunroot = "{place}/run"\n', encoding="utf-8"
    )
    files, processes = limits()
    containers.write_text(
        f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\nevents_logger = "file"\n'
        '[network]\nnetwork_backend = "netavark"\n',
        encoding="utf-8",
    )
    return {"CONTAINERS_STORAGE_CONF": str(storage), "CONTAINERS_CONF": str(containers)}


def limits() -> tuple[int, int]:
    """As many open files and processes as this machine allows: above that, runc would refuse to start."""
    files, processes = (resource.getrlimit(of)[1] for of in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    return files if files != resource.RLIM_INFINITY else 1 << 20, min(most, processes) if processes > 0 else most


def wait_until(what: str, seconds: float = 120.0) -> Iterator[None]:
    """Go round a loop, twice a second, until it is left; fail after a while."""
    deadline = time.monotonic() + seconds
    while True:
        yield
        assert time.monotonic() < deadline, f"after {seconds:g} s: {what}"
        time.sleep(0.5)
