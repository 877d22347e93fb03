"""compose.yaml, run: a head and two workers on a network without a way out, with a token; a job submitted from outside.

SeaweedFS, which needs a registry, is stood in for by moto's S3 server on this machine.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusters import free_port
from conftest import FIGURES
from engines import LOCKED, ROOT, Engine, limits, wait_until
from objectstore import Keys, Server
from relay import Relay
from test_image import well

pytestmark = [pytest.mark.image, pytest.mark.slow]

BIN = Path(sys.executable).parent
NODES = 3
PODMAN_COMPOSE = shutil.which("podman-compose", path=f"{BIN}:{os.environ['PATH']}")


@dataclass
class Cluster:
    """What `compose up` has started, and the laptop that stands outside."""

    engine: Engine
    image: str
    network: str
    files: list[Path]
    variables: dict[str, str]
    keys: Keys
    endpoint: str
    """Of the store, for the laptop."""
    project: str = field(default_factory=lambda: f"wj-test-{secrets.token_hex(3)}")

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """Run a command of docker compose, or of podman-compose."""
        line = ["docker", "compose"] if self.engine.name == "docker" else [PODMAN_COMPOSE or ""]
        for file in self.files:
            line += ["--file", str(file)]
        line += ["--project-name", self.project, *arguments]
        ended = self.engine.command(line, timeout_s=timeout_s, variables=self.variables)
        return ended.stdout + ended.stderr

    def start(self) -> None:
        """`compose up`; podman before 4.6, which knows neither health nor chains of conditions, in the same order."""
        if not self.engine.knows_health():
            self.compose("up", "--detach", "--no-deps", "store", "bucket")
            assert self.engine.run("wait", *self.containers("bucket")).stdout.split() == ["0"]
            self.compose("up", "--detach", "--no-deps", "head", "tensorboard")
            self.await_well("head")
            self.compose("up", "--detach", "--no-deps", "worker")
        else:
            self.compose("up", "--detach")

    def await_well(self, service: str) -> None:
        """Wait until the health checks of a service's containers say so."""
        for name in self.containers(service):
            for _ in wait_until(f"{name} is not well: {self.engine.logs(name)}"):
                if well(self.engine, name, service):
                    break

    def containers(self, service: str) -> list[str]:
        """The names of a service's containers."""
        labels = {"project": self.project, "service": service}
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels.items()]
        return sorted(self.engine.run("ps", "--all", *filters, "--format={{.Names}}").stdout.split())

    @property
    def token(self) -> str:
        """The cluster's own."""
        return self.variables["RAY_AUTH_TOKEN"]

    @property
    def dashboard(self) -> str:
        """Where the Jobs API is, for the laptop: no port of a network without a way out is published."""
        return f"http://{self.address(self.containers('head')[0])}:8265"

    def nodes(self) -> list[dict[str, Any]]:
        """What the cluster says of all nodes that there were; nothing while it does not answer."""
        url = f"{self.dashboard}/nodes?view=summary"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return [node["raylet"] for node in json.loads(answer.read())["data"]["summary"]]
        except (OSError, ValueError):
            return []

    def alive(self) -> list[str]:
        """The addresses of the nodes that live."""
        return [node["nodeManagerAddress"] for node in self.nodes() if node.get("state") == "ALIVE"]

    def await_nodes(self, count: int, seconds: float = 120) -> None:
        """Wait until so many nodes live."""
        for _ in wait_until(
            f"{len(self.alive())} nodes, not {count}: {self.engine.logs(self.containers('head')[0])}", seconds
        ):
            if len(self.alive()) == count:
                return

    def address(self, container: str) -> str:
        """The address of a container in the cluster's network."""
        return str(self.engine.inspect(container)["NetworkSettings"]["Networks"][self.network]["IPAddress"])

    def laptop(self, folder: Path, *words: str, token: str | None = None, timeout_s: float = 600) -> tuple[int, str]:
        """Run a program outside of all containers; returns its exit code and all that it has said."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        kept |= self.keys.variables(self.endpoint) | {
            "AWS_REGION": "us-east-1",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
        }
        kept |= {"RAY_API_SERVER_ADDRESS": self.dashboard, "RAY_AUTH_MODE": "token", "COLUMNS": "200"}
        if token is None:
            token = self.token
        if token:
            kept["RAY_AUTH_TOKEN"] = token
        ended = subprocess.run(
            words,
            cwd=folder,
            env=kept | {"PATH": f"{BIN}:{kept['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return ended.returncode, ended.stdout


@pytest.fixture(scope="module")
def cluster(engine: Engine, image: str, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`compose up`, with an override for the store alone, on a network that leads nowhere else."""
    if engine.name == "podman" and not PODMAN_COMPOSE:
        pytest.skip('there is no podman-compose: pip install ".[image]"')
    folder = tmp_path_factory.mktemp("compose")
    network, holder = f"wj-test-{secrets.token_hex(3)}", f"wj-test-{secrets.token_hex(3)}"
    engine.run("network", "create", "--internal", network)
    store = None
    try:
        # The network has an address of this machine only while there is a container in it.
        engine.run("run", "--detach", f"--name={holder}", f"--network={network}", *LOCKED, image, "sleep", "infinity")
        store = Relay(server.port, host=_gateway(engine, network))
        override = folder / "override.yaml"
        stand_in = {"image": image, "command": ["sleep", "infinity"], "healthcheck": {"disable": True}}
        networks = {"cluster": {"external": True, "name": network}}
        files, processes = limits()
        node = {"ulimits": {"nproc": processes}}  # podman asks for more than a user may have, unless it is told
        services = {"store": stand_in, "head": node, "worker": node}
        override.write_text(yaml.safe_dump({"services": services, "networks": networks}), encoding="utf-8")
        ports = {f"{name}_PORT": str(free_port()) for name in ("DASHBOARD", "STORE", "TENSORBOARD")}
        variables = {
            "WHISPER_JOBS_IMAGE": image,
            "WHISPER_JOBS_NOFILE": str(min(65536, files)),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "AWS_ACCESS_KEY_ID": server.writer.id,
            "AWS_SECRET_ACCESS_KEY": server.writer.secret,
            "AWS_ENDPOINT_URL_INSIDE": store.url,
            "WORKER_CPUS": "2",
            **ports,
        }
        compose = [ROOT / "docker/compose.yaml", override]
        cluster = Cluster(engine, image, network, compose, variables, server.writer, server.endpoint)
        try:
            started = time.monotonic()
            cluster.start()
            cluster.await_nodes(NODES)
            FIGURES["compose up"] = f"{time.monotonic() - started:.0f} s until {NODES} nodes have joined"
            yield cluster
        finally:
            cluster.compose("down", "--volumes", "--timeout=5")
    finally:
        if store:
            store.close()
        engine.run("rm", "--force", "--time=0", holder, check=False)
        engine.run("network", "rm", "--force", network, check=False)


def _gateway(engine: Engine, network: str) -> str:
    """The address that this machine has in a network."""
    found = (
        engine.inspect(network)
        if engine.name == "docker"
        else json.loads(engine.run("network", "inspect", network).stdout)[0]
    )
    if "subnets" in found:
        return str(found["subnets"][0]["gateway"])
    return str(found["IPAM"]["Config"][0]["Gateway"])


def test_all_containers_are_well_and_none_has_more_rights_than_it_needs(cluster: Cluster) -> None:
    (head,), workers = cluster.containers("head"), cluster.containers("worker")
    assert len(workers) == 2
    for service in ("head", "worker"):
        cluster.await_well(service)
    for name in (head, *workers):
        inside = cluster.engine.run(
            "exec", name, "bash", "-c", "id -u; grep -E 'CapEff|NoNewPrivs' /proc/self/status; touch /x", check=False
        )
        assert inside.stdout.split() == ["1000", "CapEff:", "0000000000000000", "NoNewPrivs:", "1"]
        assert "Read-only file system" in inside.stderr
    (bucket,) = cluster.containers("bucket")
    assert cluster.engine.inspect(bucket)["State"]["ExitCode"] == 0
    assert not well(cluster.engine, workers[0], "head"), "a worker is no head"


def test_the_network_leads_nowhere_else(cluster: Cluster) -> None:
    program = "import socket; socket.create_connection(('192.0.2.1', 443), 3)"
    ended = cluster.engine.run("exec", cluster.containers("head")[0], "python", "-c", program, check=False)
    assert ended.returncode == 1
    assert re.search("unreachable|timed out", ended.stderr)


def test_without_the_token_nobody_comes_in(cluster: Cluster, tmp_path: Path) -> None:
    for token in ("", "f" * 64):
        code, said = cluster.laptop(tmp_path, "whisper-jobs", "list", token=token)
        assert code == 7, said
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/nodes?view=summary", timeout=5)


def test_a_worker_with_another_token_does_not_join(cluster: Cluster) -> None:
    line = ("ray", "start", "--address=head:6379", "--block")
    options = (f"--network={cluster.network}", f"--env=RAY_AUTH_TOKEN={'f' * 64}")
    ended = cluster.engine.once(cluster.image, *line, options=options, check=False, timeout_s=180)
    assert ended.returncode != 0
    assert re.search("(?i)token|unauthenticated", ended.stderr + ended.stdout)
    assert len(cluster.alive()) == NODES


def test_a_job_that_is_submitted_from_outside_leaves_its_results_in_the_store(
    cluster: Cluster, server: Server, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    made = "python -m jobs.demo.nano demo/nano-whisper && python -m jobs.demo.make_speech demo/speech --clips 120"
    made += " && whisper-jobs manifest build demo/speech --out demo/manifest --val-ratio 0.25"
    assert cluster.laptop(tmp_path, "bash", "-ec", made)[0] == 0

    code, said = cluster.laptop(tmp_path, "whisper-jobs", "doctor")
    assert code == 0, said
    assert re.search(r"ok +nodes +3 nodes", said)
    started = time.monotonic()
    code, said = cluster.laptop(
        tmp_path, "whisper-jobs", "submit", "configs/cluster_demo.yaml", "--upload", timeout_s=900
    )
    assert code == 0, said
    FIGURES["demo job"] = f"{time.monotonic() - started:.0f} s, uploads included"
    assert re.search(r"cluster-demo-\w{8}  succeeded", said)

    assert "runs/cluster-demo/manifest.json" in server.keys("runs/cluster-demo")
    code, said = cluster.laptop(tmp_path, "whisper-jobs", "pull", "s3://speech/runs/cluster-demo", "here")
    assert code == 0, said
    code, said = cluster.laptop(tmp_path, "whisper-jobs", "verify", "here")
    assert code == 0, said
    assert "all as published" in said
    metrics = json.loads((tmp_path / "here/metrics.json").read_text())
    assert metrics["tuned"]["wer"] < metrics["base"]["wer"]
    assert metrics["artifacts"]["ggml-q8_0"]["identical"] > 0.7

    tags = f"http://{cluster.address(cluster.containers('tensorboard')[0])}:6006/data/plugin/scalars/tags"
    for _ in wait_until("TensorBoard does not show the run", 120):
        with urllib.request.urlopen(tags, timeout=30) as answer:
            if any("cluster-demo" in run for run in json.loads(answer.read())):
                break


def test_a_worker_that_is_stopped_drains_and_one_that_is_started_joins(cluster: Cluster) -> None:
    worker = cluster.containers("worker")[0]
    address = cluster.address(worker)
    assert address in cluster.alive()
    started = time.monotonic()
    cluster.engine.run("stop", "--time=90", worker)
    FIGURES["stop a worker"] = f"{time.monotonic() - started:.0f} s, drained"
    assert "received SIGTERM. Draining" in cluster.engine.logs(worker)
    assert time.monotonic() - started < 80, "nobody had to kill it"
    cluster.await_nodes(NODES - 1, 60)
    assert cluster.engine.inspect(worker)["State"]["ExitCode"] != 137, "killed"
    started = time.monotonic()
    cluster.engine.run("start", worker)
    cluster.await_nodes(NODES)
    FIGURES["start a worker"] = f"{time.monotonic() - started:.0f} s until it has joined"
