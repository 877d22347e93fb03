"""A submitted job whose cluster is lost: its follower is told the way back, and another one goes on from storage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bad_days import STEPS, redis, spec_of
from clusters import RayCluster, wait_for
from objectstore import BUCKET, Server
from planning import Faults
from running import CLI, run, start, write

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_a_job_whose_head_is_lost_goes_on_from_its_root_on_another(
    faults: Faults, server: Server, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    store = server.writer.variables(server.endpoint) | {"WHISPER_JOBS_CACHE": str(tmp_path / "cache")}
    root = f"s3://{BUCKET}/submitted-head"
    with RayCluster.start(workers=[1, 1], environment=faults.variables() | store) as cluster:
        laptop = store | {"RAY_API_SERVER_ADDRESS": cluster.dashboard, "RAY_AUTH_TOKEN": cluster.token}
        faults.plan("before a step", "wait", count=6, rank=1)
        spec = write(spec_of(tiny, tones, root), tmp_path)
        following = start("submit", spec, program=CLI, variables=laptop)
        wait_for(lambda: faults.fired or following.poll() is not None, "it does not train", 200)
        assert following.poll() is None, following.communicate()
        cluster.kill_head()
        for node in list(cluster.nodes):
            cluster.kill_node(node)
        faults.clear()
        cluster.start_head()
        for _ in range(2):
            cluster.add_node(1, wait=False)
        cluster.await_nodes(3)
        stdout, stderr = following.communicate(timeout=200)
        assert following.returncode == 5, stderr
        assert stdout == ""
        assert "trying again for 600 s" in stderr
        assert "has forgotten job" in stderr
        assert f"`whisper-jobs resume {root}` goes on with it" in stderr

        resumed = run("resume", root, "--wait", "-o", "json", program=CLI, variables=laptop)
    assert resumed.code == 0, resumed.stderr
    assert resumed.json()["root"] == root
    assert resumed.json()["metrics"]["training"]["steps"] == STEPS
    events = [json.loads(line) for line in server.body("submitted-head/events.jsonl").decode().splitlines()]
    steps = [event["resumed_from_step"] for event in events if event["event"] == "model"]
    assert steps[-1] == 3, "the last checkpoint before the head was lost"


@pytest.mark.skipif(not shutil.which("redis-server"), reason="there is no redis-server")
def test_a_follow_goes_on_when_the_head_begins_again_with_what_it_knew(
    faults: Faults, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    """The GCS is killed and started again, and the dashboard with it is away: the job and its follower go on."""
    with redis(tmp_path) as address:
        variables = faults.variables() | {"RAY_REDIS_ADDRESS": address}
        with RayCluster.start(workers=[1, 1], environment=variables) as cluster:
            laptop = {"RAY_API_SERVER_ADDRESS": cluster.dashboard, "RAY_AUTH_TOKEN": cluster.token}
            faults.plan("before a step", "wait", count=6, rank=1)
            spec = write(spec_of(tiny, tones, tmp_path / "run", max_failures=0), tmp_path)
            following = start("submit", spec, program=CLI, variables=laptop)
            wait_for(lambda: faults.fired or following.poll() is not None, "it does not train", 200)
            assert following.poll() is None, following.communicate()
            cluster.restart_gcs()
            cluster.await_nodes(3)
            faults.go()
            stdout, stderr = following.communicate(timeout=280)
    assert following.returncode == 0, stderr
    assert "  succeeded" in stdout
    assert stderr.count(f"step {STEPS}/{STEPS}") == 1
    assert "Starting the workers again" not in stderr
