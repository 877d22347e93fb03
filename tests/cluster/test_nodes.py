"""A worker node that goes away in mid-training: killed, replaced or not, drained, asked to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_days import assert_same_bits, begin, end, events_of, hold, node_of, notices, spec_of
from clusters import RayCluster
from planning import Faults

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster(faults: Faults) -> Iterator[RayCluster]:
    """A head without CPUs and two worker nodes of one CPU: each holds one worker."""
    with RayCluster.start(workers=[1, 1], environment=faults.variables()) as running:
        yield running


@pytest.fixture(autouse=True)
def _two_nodes(cluster: RayCluster) -> None:
    """Replace what the test before has taken away."""
    while len(cluster.nodes) < 2:
        cluster.add_node(1, wait=False)
    cluster.await_nodes(3)


def test_a_killed_node_that_is_replaced_costs_the_steps_since_the_last_checkpoint(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec, root = spec_of(tiny, tones, tmp_path / "run"), tmp_path / "run"
    process = hold(faults, spec, tmp_path, cluster)
    cluster.kill_node(node_of(cluster, faults.pid))
    cluster.add_node(1, wait=False)
    finished = end(process)
    assert finished.code == 0, finished.stderr
    assert [event["resumed_from_step"] for event in events_of(root, "model")] == [0, 3]
    assert "Starting the workers again (1 of 3: resources.max_failures)" in " ".join(notices(root))
    assert_same_bits(root, undisturbed)


def test_a_killed_node_that_is_not_replaced_ends_the_job_with_what_is_missing(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec, root = spec_of(tiny, tones, tmp_path / "run", wait_s=10), tmp_path / "run"
    process = hold(faults, spec, tmp_path, cluster)
    cluster.kill_node(node_of(cluster, faults.pid))
    finished = end(process)
    assert finished.code == 9
    assert finished.error()["error"].startswith(
        "resources: 2 workers ask for 2 CPUs (there are 1); the cluster has no "
    )
    assert finished.seconds < 90
    assert events_of(root, "model")[-1]["resumed_from_step"] == 0
    cluster.add_node(1)
    again = end(begin(spec, tmp_path, cluster))
    assert again.code == 0, again.stderr
    assert_same_bits(root, undisturbed)
