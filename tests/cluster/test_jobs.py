"""Jobs on a cluster whose nodes stay: the driver is killed, two jobs run at once, the store is away for a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_days import (
    STEPS,
    assert_same_bits,
    begin,
    end,
    events_of,
    hold,
    said,
    spec_of,
    wait_until,
)
from clusters import RayCluster, wait_for
from objectstore import Proxy, Server
from planning import Faults

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def proxy(server: Server) -> Iterator[Proxy]:
    """Before the store."""
    standing = Proxy(server.port)
    yield standing
    standing.close()


@pytest.fixture(scope="module")
def store(server: Server, proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What nodes and drivers need in their environment to use the store."""
    return server.writer.variables(proxy.endpoint) | {"WHISPER_JOBS_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def cluster(faults: Faults, store: dict[str, str]) -> Iterator[RayCluster]:
    """A head without CPUs and two worker nodes of two CPUs: room for two jobs of two workers."""
    with RayCluster.start(workers=[2, 2], environment=faults.variables() | store) as running:
        yield running


def test_a_killed_driver_leaves_nothing_at_work_and_the_same_command_goes_on(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec, root = spec_of(tiny, tones, tmp_path / "run"), tmp_path / "run"
    process = hold(faults, spec, tmp_path, cluster)
    process.kill()
    assert end(process).code == -9
    faults.go()
    (worker,) = [node for node in cluster.nodes if faults.pid in {one.pid for one in node.processes()}] or [None]
    if worker:
        wait_for(lambda: faults.pid not in {one.pid for one in worker.processes()}, "a worker outlives its driver")
    again = end(begin(spec, tmp_path, cluster))
    assert again.code == 0, again.stderr
    # Workers that see their driver gone still keep a checkpoint of their last step, if Ray leaves them the time.
    assert [event["resumed_from_step"] for event in events_of(root, "model")] in ([0, 3], [0, 5])
    assert_same_bits(root, undisturbed)


def test_two_jobs_at_once_end_as_if_each_were_alone(
    cluster: RayCluster, faults: Faults, undisturbed: Path, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    """One loses a worker while the other trains: what it gives back and asks for again is its own alone."""
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    specs = [spec_of(tiny, tones, folder / "run") for folder in folders]
    held = hold(faults, specs[0], folders[0], cluster)
    other = begin(specs[1], folders[1], cluster)
    wait_until(lambda: (folders[1] / "run/checkpoints/checkpoint-3").exists(), other)
    (worker,) = [one for node in cluster.nodes for one in node.processes() if one.pid == faults.pid]
    worker.kill()
    finished = [end(held), end(other)]
    assert [one.code for one in finished] == [0, 0], [one.stderr for one in finished]
    for folder in folders:
        assert_same_bits(folder / "run", undisturbed)
    assert [event["resumed_from_step"] for event in events_of(folders[0] / "run", "model")] == [0, 3]
    assert [event["resumed_from_step"] for event in events_of(folders[1] / "run", "model")] == [0]


def test_a_job_waits_for_room_that_another_holds_and_a_third_gives_up(
    cluster: RayCluster, faults: Faults, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("holder", "waiting", "hasty")]
    for folder in folders:
        folder.mkdir()
    specs = [
        spec_of(tiny, tones, folder / "run", cpus_per_worker=2, wait_s=wait_s)
        for folder, wait_s in zip(folders, (60, 200, 0), strict=True)
    ]
    holder = hold(faults, specs[0], folders[0], cluster)
    waiting = begin(specs[1], folders[1], cluster)
    hasty = end(begin(specs[2], folders[2], cluster))
    assert hasty.code == 9
    assert hasty.error()["error"] == (
        "resources: 2 workers ask for 4 CPUs, which the cluster has, but other jobs hold them. Wait longer "
        "(resources.wait_s), or lower resources.workers, resources.cpus_per_worker or resources.gpus_per_worker"
    )
    wait_until(said(folders[1] / "run", "waiting for the cluster to offer 4 CPUs, 200 s at most"), waiting)
    faults.go()
    finished = [end(holder), end(waiting)]
    assert [one.code for one in finished] == [0, 0], [one.stderr for one in finished]


def test_a_store_that_is_away_for_a_minute_is_waited_for(
    cluster: RayCluster, faults: Faults, proxy: Proxy, store: dict[str, str], tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec = spec_of(tiny, tones, "s3://speech/away")
    faults.plan("before the seal of a checkpoint", "wait", count=2)
    process = begin(spec, tmp_path, cluster, **store)
    wait_until(lambda: faults.fired, process)
    away_until = time.monotonic() + 60
    proxy.choose = lambda request: "reset" if time.monotonic() < away_until else None
    faults.go()
    finished = end(process)
    assert finished.code == 0, finished.stderr
    assert finished.seconds > 55
    assert "reset" in proxy.faults()
    assert finished.json()["training"]["steps"] == STEPS
