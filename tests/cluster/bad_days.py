"""The job that the tests on clusters run, and how it is followed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from clusters import Node, RayCluster, free_port
from engine import job, read_lines, saved_adapter
from planning import Faults
from running import Finished, start, steps_of, write

from service.artifacts import verify
from service.spec.job import JobSpec
from service.storage import Storage

STEPS = 16
"""Of 13 clips, 2 to a forward pass, 2 workers, 4 epochs; the last step of an epoch leaves a worker idle."""


def spec_of(base: Path, data: Path, root: Path | str, **resources: Any) -> JobSpec:
    """The job: two workers, dropout, checkpoints every three steps."""
    sections = {"resources": {"workers": 2, "wait_s": 60} | resources}
    settings: dict[str, Any] = {"epochs": 4, "lora_dropout": 0.2, "save_steps": 3, "eval_steps": 7}
    settings["merge_lora"] = False  # a day is bad enough in training
    return job(base, data, Path("unused"), sections, **settings | {"outdir": str(root)})


PATIENCE_S = 280
"""How long a job may take to anything that a test waits for; most take a tenth of it."""

started: list[subprocess.Popen[str]] = []
"""The jobs of the present test."""


def begin(spec: JobSpec, folder: Path, cluster: RayCluster, **variables: str) -> subprocess.Popen[str]:
    """Start the job's driver on this machine, as part of the cluster."""
    process = start(
        "--config", write(spec, folder), "-o", "json", cluster=cluster, variables=variables, start_new_session=True
    )
    started.append(process)
    return process


def end(process: subprocess.Popen[str]) -> Finished:
    """Wait for the job's end."""
    begun = time.monotonic()
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    return Finished(process.returncode, stdout, stderr, time.monotonic() - begun)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Look until a condition holds; a job that ends before it is an error."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def hold(
    faults: Faults, spec: JobSpec, folder: Path, cluster: RayCluster, step: int = 6, **variables: str
) -> subprocess.Popen[str]:
    """Start the job and have the worker of rank 1 wait before a step (1, 2, ...); the other waits for it."""
    faults.plan("before a step", "wait", count=step, rank=1)
    process = begin(spec, folder, cluster, **variables)
    wait_until(lambda: faults.fired, process)
    return process


def replace_nodes(cluster: RayCluster, workers: int = 2) -> None:
    """Have as many worker nodes of one CPU again, beside the head."""
    while len(cluster.nodes) < workers:
        cluster.add_node(1)
    cluster.await_nodes(1 + workers)


def node_of(cluster: RayCluster, pid: int) -> Node:
    """The worker node that a process is of."""
    (found,) = [node for node in cluster.nodes if pid in {one.pid for one in node.processes()}]
    return found


def notices(root: Path) -> list[str]:
    """What the job has said."""
    path = root / "events.jsonl"
    return [event["text"] for event in (read_lines(path) if path.exists() else []) if event["event"] == "notice"]


def said(root: Path, text: str) -> Callable[[], bool]:
    """Whether the job has said something, for `wait_until`."""
    return lambda: any(text in notice for notice in notices(root))


def events_of(root: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    return [event for event in read_lines(root / "events.jsonl") if event["event"] == kind]


def assert_same_bits(root: Path, expected: Path) -> None:
    """Adapter and transcripts are those of the other run, and nothing is missing or half-made."""
    one, other = saved_adapter(root / "adapter"), saved_adapter(expected / "adapter")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    for name in ("base", "tuned"):
        assert (root / f"evaluation/{name}.jsonl").read_bytes() == (expected / f"evaluation/{name}.jsonl").read_bytes()
    assert_whole(root)


def assert_close(root: Path, expected: Path) -> None:
    """The same up to rounding: Adam's steps make of one in the last bit one of a thousandth of the learning rate."""
    one, other = saved_adapter(root / "adapter"), saved_adapter(expected / "adapter")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert float((tensor - other[name]).abs().max()) <= 2e-5, name
    assert_whole(root)


def assert_whole(root: Path) -> None:
    """The run is complete, and every file is what its manifest says."""
    assert verify(Storage(str(root))).problems == []
    assert list(root.rglob(".wj-*")) == []
    assert max(steps_of(root, "step")) == STEPS


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A Redis server of its own; gives its address."""
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(["redis-server", *options], stdout=subprocess.PIPE)
    assert process.stdout
    try:
        while b"eady to accept connections" not in (line := process.stdout.readline()):
            assert line, "redis-server has ended"
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
