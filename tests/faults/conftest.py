"""A Ray cluster whose processes know of planned faults."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from engine import environment
from planning import Faults


@pytest.fixture(scope="session")
def faulty_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """A cluster of one node with four CPUs whose processes know of planned faults."""
    faults = Faults(tmp_path_factory.mktemp("faults"), "")
    before = dict(os.environ)
    os.environ.update(
        environment() | faults.variables() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    )
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "object_store_memory": 200_000_000})
    os.environ.clear()
    os.environ.update(before)
    faults.address = cluster.address
    yield faults
    cluster.shutdown()


@pytest.fixture
def faults(faulty_cluster: Faults) -> Iterator[Faults]:
    """Faults in jobs on the session's cluster."""
    faulty_cluster.clear()
    yield faulty_cluster
    faulty_cluster.clear()
