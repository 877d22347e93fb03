"""The head in mid-training: its GCS is killed and restarted, with Redis behind it; or it is lost, and another comes."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from bad_days import STEPS, assert_same_bits, begin, end, events_of, hold, redis, spec_of
from clusters import RayCluster
from objectstore import Server
from planning import Faults

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.mark.skipif(not shutil.which("redis-server"), reason="there is no redis-server")
def test_a_gcs_that_is_killed_and_restarted_is_not_noticed(
    faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    with (
        redis(tmp_path) as address,
        RayCluster.start(workers=[1, 1], environment=faults.variables() | {"RAY_REDIS_ADDRESS": address}) as cluster,
    ):
        spec, root = spec_of(tiny, tones, tmp_path / "run", max_failures=0), tmp_path / "run"
        process = hold(faults, spec, tmp_path, cluster)
        cluster.restart_gcs()
        cluster.await_nodes(3)
        faults.go()
        finished = end(process)
    assert finished.code == 0, finished.stderr
    assert [event["resumed_from_step"] for event in events_of(root, "model")] == [0]
    assert_same_bits(root, undisturbed)


def test_a_head_that_is_lost_ends_the_job_and_with_another_the_same_command_goes_on_from_storage(
    faults: Faults, server: Server, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    """The driver is where a submitted job's is: on the head, with which it dies."""
    store = server.writer.variables(server.endpoint) | {"WHISPER_JOBS_CACHE": str(tmp_path / "cache")}
    with RayCluster.start(workers=[1, 1], environment=faults.variables() | store) as cluster:
        spec = spec_of(tiny, tones, "s3://speech/head")
        process = hold(faults, spec, tmp_path, cluster, **store)
        process.send_signal(signal.SIGKILL)
        cluster.kill_head()
        for node in list(cluster.nodes):
            cluster.kill_node(node)
        assert end(process).code == -signal.SIGKILL
        faults.clear()
        cluster.start_head()
        for _ in range(2):
            cluster.add_node(1, wait=False)
        cluster.await_nodes(3)
        again = end(begin(spec, tmp_path, cluster, **store))
    assert again.code == 0, again.stderr
    assert "going on from step 3 of 16" in again.stderr
    assert again.json()["training"]["steps"] == STEPS
