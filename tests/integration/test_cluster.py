"""The Ray edge: what happens in other processes comes back as events in order, results, and errors with a meaning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import environment
from running import ROOT

from jobs.cluster.connection import connected
from jobs.cluster.errors import as_user_error
from jobs.cluster.events import Events
from jobs.cluster.placement import Wish
from jobs.cluster.resources import Resources, resources_for
from jobs.cluster.tasks import run_tasks
from jobs.cluster.waiting import require_resources
from jobs.stopping import SIGNALS, StopSignals
from service.errors import Fault, InfeasibleError, JobFailedError, ManifestError, WorkerLostError
from service.spec.job import JobSpec

pytestmark = pytest.mark.slow

FAULTS = [Fault("train.csv, line 3", "no such file", "/a.wav"), Fault("val.csv", "has no usable row")]


@pytest.fixture(scope="module")
def joined(cluster: str) -> Iterator[bool]:
    """This process as a driver on the cluster."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    os.environ["RAY_ADDRESS"] = cluster
    try:
        with connected(StopSignals()) as local:
            yield local
    finally:
        del os.environ["RAY_ADDRESS"]
        for number, handler in before.items():
            signal.signal(number, handler)


def run_task(function: Callable[..., Any], *arguments: Any) -> Any:
    return run_tasks(function, [arguments])[0]


def spec_of(**resources: Any) -> JobSpec:
    return JobSpec.model_validate({"resources": resources | {"wait_s": 0}})


def test_a_cluster_from_outside_is_not_a_local_ray(joined: bool) -> None:
    assert joined is False


def test_a_task_runs_in_another_process_and_its_result_comes_back(joined: bool) -> None:
    def work(number: int) -> tuple[int, int]:
        return number + 1, os.getpid()

    result, process = run_task(work, 41)
    assert result == 42
    assert process != os.getpid()


def test_our_errors_come_back_whole(joined: bool) -> None:
    def fail() -> None:
        raise ManifestError(FAULTS)

    with pytest.raises(ManifestError) as caught:
        run_task(fail)
    assert type(caught.value) is ManifestError
    assert caught.value.faults == FAULTS


def test_other_errors_are_a_failed_job_with_their_type_and_first_line(joined: bool) -> None:
    def fail() -> None:
        raise KeyError("lost\nmore")

    with pytest.raises(JobFailedError, match=r"^KeyError: 'lost") as caught:
        run_task(fail)
    (traceback,) = caught.value.__notes__
    assert "in fail" in traceback


def test_an_error_that_cannot_be_pickled_is_a_failed_job_too(joined: bool) -> None:
    def fail() -> None:
        class LocalError(Exception):
            def __init__(self, one: int, two: int) -> None:
                self.handle = open(os.devnull)  # noqa: SIM115  # what no pickle takes
                super().__init__("cannot travel")

        raise LocalError(1, 2)

    with pytest.raises(JobFailedError, match=r"^LocalError: cannot travel"):
        run_task(fail)


def test_a_task_whose_process_dies_each_time_is_given_up(joined: bool, tmp_path: Path) -> None:
    def die() -> None:
        (tmp_path / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerLostError, match="a process of the job died"):
        run_task(die)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_task_whose_process_dies_once_is_tried_again_and_the_others_are_not(joined: bool, tmp_path: Path) -> None:
    def die_once(name: str) -> str:
        calls = tmp_path / name
        with open(calls, "a") as file:
            file.write("x")
        if name == "two" and calls.read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    assert run_tasks(die_once, [("one",), ("two",), ("three",)]) == ["one", "two", "three"]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one": "x", "two": "xx", "three": "x"}


def test_events_of_all_processes_come_in_the_order_in_which_they_were_told(joined: bool) -> None:
    seen: list[dict[str, Any]] = []
    events = Events(seen.append)

    def tell(log: Any, name: str) -> None:
        import ray

        ray.get([log.emit.remote({"event": "step", "by": name, "step": step}) for step in range(20)])

    events.emit({"event": "stage", "by": "driver"})
    run_task(tell, events.log, "worker")
    events.emit({"event": "stage", "by": "driver"})
    run_task(tell, events.log, "late")
    events.close()
    expected = ["driver", *["worker"] * 20, "driver", *["late"] * 20]
    assert [event["by"] for event in seen] == expected
    assert [event["step"] for event in seen if "step" in event] == [*range(20), *range(20)]
    assert [event["time"] for event in seen] == sorted(event["time"] for event in seen)


def test_workers_get_what_is_asked_for_and_a_gpu_only_where_there_is_one(joined: bool) -> None:
    assert resources_for(spec_of(workers=3, cpus_per_worker=0.5)).per_worker() == {"CPU": 0.5}
    assert resources_for(spec_of(gpus_per_worker=2)).per_worker() == {"CPU": 1.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ({"workers": 4}, None),
        ({"workers": 8, "cpus_per_worker": 0.5}, None),
        ({"workers": 5}, "5 CPUs (there are 4)"),
        ({"workers": 2, "cpus_per_worker": 3}, "6 CPUs (there are 4)"),
        ({"workers": 1, "gpus_per_worker": 1}, "1 GPU (there are 0)"),
    ],
)
def test_what_does_not_fit_on_the_nodes_is_named(joined: bool, asked: dict[str, Any], missing: str | None) -> None:
    told: list[str] = []
    if missing is None:
        assert require_resources(spec_of(**asked), local=False, tell=told.append).workers == asked["workers"]
        return
    with pytest.raises(InfeasibleError) as caught:
        require_resources(spec_of(**asked), local=True, tell=told.append)
    assert missing in str(caught.value)
    assert told == []


def test_a_task_that_no_node_could_run_is_given_up(joined: bool) -> None:
    with pytest.raises(InfeasibleError, match=r"^resources: 1 process asks for 9 CPUs \(there are 4\)"):
        run_tasks(os.getpid, [()], cpus=9, wait_s=0)


def test_a_wish_for_room_holds_it_until_it_is_withdrawn_and_is_nobody_elses(joined: bool) -> None:
    first, second = (Wish(Resources(workers, 1, 0)) for workers in (3, 2))
    try:
        assert first.granted(30)
        assert not second.granted(0.5)
        first.withdraw()
        assert second.granted(30), "the other's withdrawal took nothing from it"
    finally:
        second.withdraw()


def test_an_elastic_job_takes_what_room_there_is_but_not_less_than_it_says(joined: bool) -> None:
    told: list[str] = []
    found = require_resources(spec_of(workers=6, min_workers=2), local=False, tell=told.append)
    assert found.workers == 4
    assert told == ["there is room for 4 of 6 workers: going on with them"]
    with pytest.raises(InfeasibleError, match=r"6 workers ask for 6 CPUs \(there are 4\)"):
        require_resources(spec_of(workers=6, min_workers=5), local=False, tell=told.append)


LOCAL_RAY = """
from jobs.local_ray import give_token
give_token()
import ray
from jobs.cluster.connection import connected
from jobs.stopping import StopSignals
with connected(StopSignals()) as local:
    assert local
    print(ray.get_runtime_context().gcs_address, flush=True)
    input()
"""


@pytest.mark.parametrize(
    "stranger", [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, pytest.param({}, marks=pytest.mark.faults)]
)
def test_nobody_else_can_join_a_local_ray(stranger: dict[str, str]) -> None:
    known = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "1" * 64}  # neither counts
    with subprocess.Popen(
        [sys.executable, "-c", LOCAL_RAY], cwd=ROOT, env=known, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        address = process.stdout.readline().strip()
        assert address
        joining = f"import ray; ray.init({address!r}, logging_level='ERROR'); print('joined')"
        clean = {name: value for name, value in known.items() if not name.startswith("RAY_")}
        tried = subprocess.run(
            [sys.executable, "-c", joining], env=clean | stranger, capture_output=True, text=True, timeout=100
        )
        process.communicate("\n")
    assert process.returncode == 0
    assert tried.returncode != 0
    assert "joined" not in tried.stdout


def test_an_error_of_ours_is_not_wrapped() -> None:
    error = ManifestError(FAULTS)
    assert as_user_error(error) is error
    assert str(as_user_error(ValueError("\n\n  two\nlines"))) == "ValueError: two"
    assert str(as_user_error(ValueError())) == "ValueError: no message"
