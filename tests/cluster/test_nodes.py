"""A worker node that goes away in mid-training: killed, replaced or not, drained, asked to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_days import (
    assert_close,
    assert_same_bits,
    begin,
    end,
    events_of,
    hold,
    node_of,
    notices,
    replace_nodes,
    said,
    spec_of,
    wait_until,
)
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
    replace_nodes(cluster)


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


def test_an_elastic_job_goes_on_with_fewer_workers_and_takes_more_when_there_is_room(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec, root = spec_of(tiny, tones, tmp_path / "run", wait_s=30, min_workers=1), tmp_path / "run"
    process = hold(faults, spec, tmp_path, cluster)
    cluster.kill_node(node_of(cluster, faults.pid))
    faults.plan("before a step", "wait", count=5)
    wait_until(lambda: faults.fired, process)
    assert "there is room for 1 of 2 workers: going on with them" in notices(root)
    cluster.add_node(1)
    wait_until(said(root, "there is room for 2 workers again: stopping with a checkpoint"), process)
    faults.go()
    finished = end(process)
    assert finished.code == 0, finished.stderr
    # From the last checkpoint with one worker; with two again from the very step at which the one stopped.
    assert [event["resumed_from_step"] for event in events_of(root, "model")] == [0, 3, 7]
    assert_close(root, undisturbed)


def test_a_node_with_a_sigterm_drains_and_no_step_is_lost(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    """As a pod that is deleted, or a spot instance with notice: `max_failures` 0 says that it is no failure."""
    spec, root = spec_of(tiny, tones, tmp_path / "run", max_failures=0), tmp_path / "run"
    process = hold(faults, spec, tmp_path, cluster)
    leaving = node_of(cluster, faults.pid)
    cluster.terminate_node(leaving)
    wait_until(said(root, "is being taken away: stopping with a checkpoint"), process)
    cluster.add_node(1, wait=False)
    faults.go()
    finished = end(process)
    assert finished.code == 0, finished.stderr
    assert [event["resumed_from_step"] for event in events_of(root, "model")] == [0, 5]
    assert_same_bits(root, undisturbed)
    leaving.process.wait(timeout=60)
    cluster.nodes.remove(leaving)


def test_a_worker_with_a_sigterm_finishes_its_step_and_the_group_begins_again_from_there(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec, root = spec_of(tiny, tones, tmp_path / "run", max_failures=0), tmp_path / "run"
    process = hold(faults, spec, tmp_path, cluster)
    os.kill(faults.pid, signal.SIGTERM)
    faults.go()
    finished = end(process)
    assert finished.code == 0, finished.stderr
    assert "stopped at step 5 of 16: a worker was asked to end (SIGTERM). Starting the workers again" in " ".join(
        notices(root)
    )
    assert [event["resumed_from_step"] for event in events_of(root, "model")] == [0, 5]
    assert_same_bits(root, undisturbed)
