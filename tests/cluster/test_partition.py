"""A worker node that is cut off from all others for a while, its processes alive."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_days import assert_same_bits, end, events_of, hold, node_of, spec_of
from clusters import RayCluster, networks_missing, wait_for
from planning import Faults

pytestmark = [pytest.mark.slow, pytest.mark.cluster]
PARTITION_S = 20.0


@pytest.fixture(scope="module")
def cluster(faults: Faults) -> Iterator[RayCluster]:
    """A head and two worker nodes, each in a network of its own."""
    if missing := networks_missing():
        pytest.skip(missing)
    with RayCluster.start(workers=[1, 1], environment=faults.variables(), networks=True) as running:
        yield running


def test_a_partition_of_20_s_costs_at_most_the_steps_since_the_last_checkpoint(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    """The workers wait for each other and go on when the network is back.

    Ray's own calls to the worker that was cut off may fail of it: Ray Train takes that for a death, once.
    """
    spec, root = spec_of(tiny, tones, tmp_path / "run", max_failures=1), tmp_path / "run"
    process = hold(faults, spec, tmp_path, cluster)
    node = node_of(cluster, faults.pid)
    cluster.cut(node)
    faults.go()
    back = time.monotonic() + PARTITION_S
    wait_for(lambda: time.monotonic() > back or process.poll() is not None, "time stands still", 2 * PARTITION_S)
    assert process.poll() is None, process.communicate()
    cluster.mend(node)
    finished = end(process)
    assert finished.code == 0, finished.stderr
    first, *again = [event["resumed_from_step"] for event in events_of(root, "model")]
    assert first == 0
    assert len(again) <= 1
    assert all(step >= 3 for step in again)
    assert_same_bits(root, undisturbed)
