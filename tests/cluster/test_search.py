"""A search on a cluster whose nodes go away: its trials go on elsewhere, and measure what they would have measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_days import begin, end, replace_nodes, spec_of, wait_until
from clusters import RayCluster
from engine import run_engine

from jobs.search.trial import job_of
from service.artifacts import verify
from service.spec.job import JobSpec
from service.storage import Storage
from service.trials import Search, Trial, read_search

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

ROWS = 13


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head without CPUs and two worker nodes of one CPU: two trials at once."""
    with RayCluster.start(workers=[1, 1]) as running:
        yield running


@pytest.fixture(autouse=True)
def _two_nodes(cluster: RayCluster) -> None:
    """Replace what the test before has taken away."""
    replace_nodes(cluster)


def search_of(tiny: Path, tones: Path, root: Path, workers: int, **resources: Any) -> JobSpec:
    content = spec_of(tiny, tones, root, workers=workers, **resources).model_dump(mode="json")
    content["training"] |= {"epochs": 40}
    content["evaluation"] |= {"metric": "loss"}
    search = {"space": {"lora_r": [4, 8]}, "sampler": "grid", "scheduler": "none", "evaluations": 4}
    return JobSpec.model_validate(content | {"kind": "search", "search": search})


def table_of(root: Path) -> Search | None:
    return read_search(Storage(str(root))) if (root / "search/trials.json").exists() else None


def running(root: Path) -> list[Trial]:
    """The trials that are under way and have been evaluated."""
    table = table_of(root)
    return [trial for trial in table.trials if trial.status == "running" and trial.evaluations] if table else []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_node_costs_a_trial_its_steps_since_the_last_checkpoint(
    workers: int, cluster: RayCluster, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    spec = search_of(tiny, tones, root, workers)
    process = begin(spec, tmp_path, cluster)
    wait_until(lambda: len(running(root)) > 1, process)
    cluster.kill_node(cluster.nodes[0])
    cluster.add_node(1, wait=False)
    finished = end(process)
    assert finished.code == 0, finished.stderr
    assert verify(Storage(str(root))).problems == []
    table = table_of(root)
    assert table is not None
    assert [trial.status for trial in table.trials] == 4 * ["finished"]
    for trial in table.trials[1:]:
        made = job_of(spec, trial.settings, ROWS)
        alone = made.training.model_copy(update={"outdir": str(tmp_path / trial.id)})
        result, _ = run_engine(made.model_copy(update={"training": alone}))
        history = [(entry["step"], entry["loss"]) for entry in result["training"]["history"]]
        assert [(each.step, each.loss) for each in trial.evaluations] == history


def test_a_search_that_has_no_node_left_ends_with_what_is_missing_and_goes_on(
    cluster: RayCluster, tiny: Path, tones: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    spec = search_of(tiny, tones, root, 0, wait_s=15)
    process = begin(spec, tmp_path, cluster)
    wait_until(lambda: bool(running(root)), process)
    for node in list(cluster.nodes):
        cluster.kill_node(node)
    finished = end(process)
    assert finished.code == 9, finished.stderr
    assert "the cluster has no room for one trial" in finished.error()["error"]
    cluster.add_node(1)
    again = end(begin(spec, tmp_path, cluster))
    assert again.code == 0, again.stderr
    assert verify(Storage(str(root))).problems == []
