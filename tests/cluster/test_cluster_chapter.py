"""docs/cluster.md by its letter: machines with networks of their own, a token, an S3 server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from clusters import Bridge, networks_missing, wait_for
from engine import environment
from objectstore import Server
from relay import Relay

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
CLUSTER, LAPTOP = re.findall(r"```bash\n(.*?)```", CHAPTER, re.DOTALL)
ON_HEAD, ON_WORKERS = CLUSTER.removeprefix("# on the head\n").split("# on each worker node, with the same exports\n")
EXPORTS = [line for line in ON_HEAD.splitlines() if line.startswith("export ")]


@dataclass
class Machine:
    """A place with a home folder and, but for the laptop, a network and a /tmp of its own."""

    home: Path
    network: str | None = None
    address: str = ""

    def run(self, lines: str, timeout_s: int = 540) -> str:
        """Run lines as one shell; returns what they print. Daemons of them go on."""
        inside: list[str] = []
        if self.network:
            # Ray's nodes keep their files under /tmp/ray, each its own.
            inside = ["ip", "netns", "exec", self.network, "unshare", "--mount"]
            lines = f"mount --bind {self.home}/tmp /tmp\n{lines}"
        kept = {name: value for name, value in environment().items() if not name.startswith(("RAY_", "AWS_"))}
        variables = {"HOME": str(self.home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        variables |= {"RAY_USAGE_STATS_ENABLED": "0", "AWS_EC2_METADATA_DISABLED": "true"}
        if self.network:
            variables["GLOO_SOCKET_IFNAME"] = Bridge.INSIDE
        log = self.home / "said"
        with open(log, "wb") as said:
            ended = subprocess.run(
                [*inside, "bash", "-euc", lines],
                cwd=self.home,
                env=kept | variables,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
            )
        text = log.read_text()
        assert ended.returncode == 0, text
        return text

    def end(self) -> None:
        """Kill all that runs in its network."""
        assert self.network
        found = subprocess.run(["ip", "netns", "pids", self.network], capture_output=True, text=True, check=True)
        for pid in map(int, found.stdout.split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def machines() -> Iterator[dict[str, Machine]]:
    """A head and two workers on one bridge, and a laptop that reaches them."""
    if why := networks_missing():
        pytest.skip(why)
    bridge = Bridge()
    found = {}
    place = Path(tempfile.mkdtemp(prefix="wj-", dir="/var/tmp"))
    try:
        for name in ("head", "one", "two"):
            network, address = bridge.add_network()
            found[name] = Machine(place / name, network, address)
        found["laptop"] = Machine(place / "laptop", None, bridge.address)
        for machine in found.values():
            (machine.home / "tmp").mkdir(parents=True)
        yield found
    finally:
        for machine in found.values():
            if machine.network:
                machine.end()
        wait_for(lambda: not any(_pids(m.network) for m in found.values() if m.network), "processes stay")
        bridge.close()
        shutil.rmtree(place)


def _pids(network: str) -> list[str]:
    return subprocess.run(["ip", "netns", "pids", network], capture_output=True, text=True, check=True).stdout.split()


def test_the_cluster_chapter_works_by_its_letter(machines: dict[str, Machine], server: Server) -> None:
    head, laptop = machines["head"], machines["laptop"]
    store = Relay(server.port, host=laptop.address)
    for key in server.keys("runs/cluster-demo"):
        server.s3.delete_object(Bucket="speech", Key=key)

    def real(lines: str) -> str:
        places = {"STORE": f"{laptop.address}:{store.port}", "HEAD": head.address}
        keys = {"KEY": server.writer.id, "SECRET": server.writer.secret}
        for word, value in (places | keys).items():
            lines = re.sub(rf"(?<=[/=]){word}\b", value, lines)
        return lines

    head.run(real(ON_HEAD))
    token = head.home / ".ray/auth_token"
    for machine in machines.values():
        if machine is not head:
            (machine.home / ".ray").mkdir()
            shutil.copy(token, machine.home / ".ray/auth_token")
    for name in ("one", "two"):
        machines[name].run(real("\n".join([*EXPORTS, ON_WORKERS])))

    made = f"export PYTHONPATH={ROOT}\npython -m jobs.demo.nano demo/nano-whisper\n"
    made += "python -m jobs.demo.make_speech demo/speech --clips 120\n"
    made += "whisper-jobs manifest build demo/speech --out demo/manifest --val-ratio 0.25"
    laptop.run(made)
    (laptop.home / "configs").symlink_to(ROOT / "configs")
    said = laptop.run(real(LAPTOP))

    assert "FAIL" not in said
    assert re.search(r"ok +nodes +3 nodes with \d+ CPUs and 0 GPUs in all", said)
    assert re.search(r"uploads +\d+ of \d+ files, [\d.]+ MB", said)
    assert re.search(r"uploading to s3://speech/runs/uploads: \d+ of \d+ files", said)
    assert re.search(r"cluster-demo-\w{8}  succeeded", said)
    assert "all as published" in said
    metrics = json.loads((laptop.home / "here/metrics.json").read_text())
    assert metrics["artifacts"]["ggml-q8_0"]["identical"] > 0.7
    events = [json.loads(line) for line in (laptop.home / "here/events.jsonl").read_text().splitlines()]
    assert "train" in {event.get("stage") for event in events}
    store.close()
