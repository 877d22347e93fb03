"""A small Ray cluster that all jobs of the session join; a job that is to start its own Ray does not ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import PLANTED, RayCluster
from objectstore import Server


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a running cluster of one node with four CPUs, whatever this machine has."""
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 200_000_000})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def head(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster of one node with token authentication, whose processes know the S3 server, as jobs are submitted to."""
    variables = server.writer.variables(server.endpoint) | {"HF_TOKEN": PLANTED}
    variables["WHISPER_JOBS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with RayCluster.start(num_cpus_head=3, workers=[], environment=variables) as cluster:
        yield cluster


@pytest.fixture
def laptop(head: RayCluster, server: Server, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has the cluster's address and token, and the keys of the store."""
    there = {"RAY_API_SERVER_ADDRESS": head.dashboard, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token}
    return there | server.writer.variables(server.endpoint) | {"WHISPER_JOBS_CACHE": str(tmp_path / "laptops-cache")}
