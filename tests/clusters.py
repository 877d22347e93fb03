"""For tests: a Ray cluster of processes of their own, with token authentication, whose nodes can be killed and cut off.

Nothing here joins the cluster: what it says of itself is asked of its dashboard, over HTTP.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from engine import environment as child_environment

RAY = Path(sys.executable).with_name("ray")
READY_S = 90.0
PLANTED = "hf_plantedSecretOfTheClustersEnvironment"
"""A secret for the environment of a cluster's processes, that must be found nowhere else."""

_PORTS = range(20_000, 30_000)
"""Away from Ray's own for workers (10000-19999) and from those that the system gives to clients (32768 and up)."""


def free_port() -> int:
    """A port that nobody listens on, and that the system gives to no client."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            return port


def wait_for(condition: Callable[[], Any], what: str, seconds: float = READY_S) -> Any:
    """Look until a condition holds; returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"after {seconds:g} s: {what}"
        time.sleep(0.1)
    return found


@dataclass
class Node:
    """One `ray start --block` with all of its processes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    network: str | None = None
    """Its network namespace; None: the machine's own network."""

    @property
    def pid(self) -> int:
        """Of `ray start`, which leads the session of all processes of the node."""
        return self.process.pid

    def processes(self) -> list[psutil.Process]:
        """What runs of it: its session, and what its processes have started in others (drivers of submitted jobs)."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.pid:
                    for one in (process, *process.children(recursive=True)):
                        found[one.pid] = one
        return [one for one in found.values() if _runs(one)]

    def process_named(self, name: str) -> psutil.Process:
        """One of its processes, such as `gcs_server` or `raylet`."""
        (found,) = [process for process in self.processes() if Path((process.cmdline() or [""])[0]).name == name]
        return found

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        while found := self.processes():
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=5)
        self.process.wait()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass
class RayCluster:
    """A head and worker nodes; made by `RayCluster.start`.

    Attributes:
        dashboard: http://127.0.0.1:PORT, where the Jobs API is.
        address: host:port of the GCS, which a driver's RAY_ADDRESS names.
        token: what clients need in RAY_AUTH_TOKEN.
        head: the head; None: it was killed.
        nodes: the worker nodes that were started and not yet killed.
    """

    folder: Path
    token: str
    environment: dict[str, str]
    head_cpus: int
    bridge: Bridge | None
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    head: Node | None = None
    nodes: list[Node] = field(default_factory=list)
    gcs: subprocess.Popen[bytes] | None = None
    """The GCS that `restart_gcs` has started, outside of the head's session."""
    started: int = 0

    @classmethod
    @contextmanager
    def start(
        cls,
        num_cpus_head: int = 0,
        workers: Sequence[int] = (2, 2),
        environment: dict[str, str] | None = None,
        networks: bool = False,
    ) -> Iterator[RayCluster]:
        """A running cluster; everything of it ends with the context.

        Args:
            num_cpus_head: CPUs of the head.
            workers: CPUs of each worker node.
            environment: more variables for all of its processes.
            networks: give each worker node a network of its own, that `cut` can take away (wants root).
        """
        folder = Path(tempfile.mkdtemp(prefix="wj-", dir="/tmp"))  # a Unix socket's path has 107 bytes
        bridge = Bridge() if networks else None
        cluster = cls(folder, secrets.token_hex(32), environment or {}, num_cpus_head, bridge)
        try:
            cluster.start_head()
            for cpus in workers:
                cluster.add_node(cpus, wait=False)
            cluster.await_nodes(1 + len(workers))
            yield cluster
        finally:
            for node in list(cluster.nodes):
                cluster.kill_node(node)
            cluster.kill_head()
            if bridge:
                bridge.close()
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def dashboard(self) -> str:
        """Address of the dashboard and the Jobs API."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def address(self) -> str:
        """Address of the GCS."""
        return f"{self.host}:{self.port}"

    @property
    def host(self) -> str:
        """The head's IP address."""
        return self.bridge.address if self.bridge else _own_address()

    def variables(self) -> dict[str, str]:
        """What a driver needs in its environment to join."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start_head(self) -> Node:
        """Start the head, the first one or another with the same command line, and wait for its answer."""
        arguments = ["--head", f"--num-cpus={self.head_cpus}", f"--port={self.port}"]
        arguments += ["--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard_port}"]
        arguments += [f"--ray-client-server-port={free_port()}", f"--node-ip-address={self.host}"]
        self.head = self._launch(arguments, None)
        self._await(lambda: self.ask("/api/version"), "the dashboard does not answer", self.head)
        return self.head

    def add_node(self, cpus: int, *, wait: bool = True) -> Node:
        """Start another worker node."""
        network, address = self.bridge.add_network() if self.bridge else (None, self.host)
        arguments = [f"--address={self.address}", f"--num-cpus={cpus}", f"--node-ip-address={address}"]
        node = self._launch(arguments, network)
        self.nodes.append(node)
        if wait:
            self._await(lambda: node.name in self.names(), "the node has not joined", node)
        return node

    def await_nodes(self, count: int, seconds: float = READY_S) -> None:
        """Wait until the cluster counts so many living nodes, head included."""
        wait_for(lambda: len(self.alive()) == count, f"{len(self.alive())} nodes, not {count}", seconds)

    def kill_node(self, node: Node) -> None:
        """SIGKILL to all processes of a worker node."""
        node.kill()
        self.nodes.remove(node)

    def terminate_node(self, node: Node) -> None:
        """SIGTERM to `ray start --block`, as a supervisor sends it; the node drains, then ends."""
        node.process.send_signal(signal.SIGTERM)

    def kill_head(self) -> None:
        """SIGKILL to all processes of the head."""
        if self.gcs:
            self.gcs.kill()
            self.gcs.wait()
        if self.head:
            self.head.kill()
        self.gcs = self.head = None

    def restart_gcs(self) -> None:
        """Kill the head's GCS, and start it again with the same command line and environment (it wants Redis).

        `ray start --block` would end the whole head with it, so that one is stopped first.
        """
        assert self.head
        before = self.head.process_named("gcs_server")
        line, variables, folder = before.cmdline(), before.environ(), before.cwd()
        self.head.process.send_signal(signal.SIGSTOP)
        before.kill()
        wait_for(lambda: not _runs(before), "the GCS does not end")
        with open(self.head.log, "ab") as output:
            self.gcs = subprocess.Popen(line, env=variables, cwd=folder, stdout=output, stderr=output)

    def alive(self) -> list[dict[str, Any]]:
        """What the cluster says of its living nodes; nothing while it does not answer."""
        found = self.ask("/nodes?view=summary") or {}
        summary = found.get("data", {}).get("summary", [])
        return [node for node in summary if node.get("raylet", {}).get("state") == "ALIVE"]

    def names(self) -> list[str]:
        """The names of the living nodes, as the cluster sees it."""
        return [node["raylet"].get("nodeName", "") for node in self.alive()]

    def ask(self, path: str) -> Any:
        """What the dashboard answers; None: nothing."""
        request = urllib.request.Request(self.dashboard + path, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.loads(answer.read())
        except (OSError, ValueError):
            return None

    def cut(self, node: Node) -> None:
        """Cut a worker node off from all others; its processes go on."""
        assert self.bridge
        assert node.network
        self.bridge.switch(node.network, "down")

    def mend(self, node: Node) -> None:
        """Connect it again."""
        assert self.bridge
        assert node.network
        self.bridge.switch(node.network, "up")

    def _launch(self, arguments: list[str], network: str | None) -> Node:
        self.started += 1
        name = f"n{self.started}"
        own, log = self.folder / name, self.folder / f"{name}.log"
        around = ["ip", "netns", "exec", network] if network else []
        arguments = [
            *arguments,
            "--block",
            f"--node-name={name}",
            f"--temp-dir={own}",
            "--object-store-memory=100000000",
            f"--node-manager-port={free_port()}",
            f"--object-manager-port={free_port()}",
            f"--metrics-export-port={free_port()}",
            f"--runtime-env-agent-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--dashboard-agent-grpc-port={free_port()}",
        ]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*around, str(RAY), "start", *arguments],
                env=self._variables(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Node(name, process, log, network)

    def _variables(self) -> dict[str, str]:
        every = child_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        every |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
        every["PATH"] = f"{RAY.parent}:{every['PATH']}"  # `python` of a submitted job is the one that Ray runs in
        if self.bridge:
            every["GLOO_SOCKET_IFNAME"] = Bridge.INSIDE
        return every | self.environment

    def _await(self, condition: Callable[[], Any], what: str, node: Node) -> None:
        def look() -> Any:
            assert node.process.poll() is None, node.log.read_text()
            return condition()

        wait_for(look, what)


class Bridge:
    """A switch of this machine with networks of their own on it."""

    INSIDE = "wj0"
    """Name of the interface in each of them: gloo wants one name on all nodes."""

    def __init__(self) -> None:
        number = secrets.randbelow(200) + 20
        self.name, self._net = f"wjb{number}", f"10.213.{number}"
        self.address = f"{self._net}.1"
        self._networks: list[str] = []
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def add_network(self) -> tuple[str, str]:
        """A network namespace on the bridge; returns its name and its IP address."""
        number = len(self._networks) + 2
        network, address = f"{self.name}n{number}", f"{self._net}.{number}"
        self._networks.append(network)
        _ip("netns", "add", network)
        _ip("link", "add", f"{network}v", "type", "veth", "peer", "name", self.INSIDE, "netns", network)
        _ip("link", "set", f"{network}v", "master", self.name, "up")
        _ip("-n", network, "addr", "add", f"{address}/24", "dev", self.INSIDE)
        for device in (self.INSIDE, "lo"):
            _ip("-n", network, "link", "set", device, "up")
        _ip("-n", network, "route", "add", "default", "via", self.address)
        return network, address

    def switch(self, network: str, state: str) -> None:
        """Take a network from the bridge (`down`), or put it back (`up`)."""
        _ip("link", "set", f"{network}v", state)

    def close(self) -> None:
        """Remove all of it."""
        for network in self._networks:
            _ip("netns", "delete", network)
        _ip("link", "delete", self.name)


def networks_missing() -> str | None:
    """Why this machine can make no networks of its own; None: it can."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    if not shutil.which("ip"):
        return "there is no `ip` command"
    name = f"wjt{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "link", "add", name, "type", "bridge"], capture_output=True, text=True)
    if made.returncode == 0:
        _ip("link", "delete", name)
    return made.stderr.strip() or None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _own_address() -> str:
    """As Ray finds it: the one that this machine speaks to others from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 80))  # nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
