"""How a job ends that cannot go on: a clear line, an exit code of its own, checkpoints intact, nothing left behind."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from disks import small_disk
from engine import job, read_lines, run_engine, saved_adapter
from planning import Faults
from running import CLI, JOB, Finished, processes_of, steps_of, wait_until, write
from safetensors.torch import load_file, save_file

from jobs.train.store import CheckpointStore, fault_of
from service.artifacts import verify
from service.spec.job import JobSpec
from service.storage import LOCK, Storage

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"epochs": 4, "lora_dropout": 0.2, "save_steps": 3, "eval_steps": 7}


def spec_of(base: Path, data: Path, root: Path, workers: int = 1, **more: Any) -> JobSpec:
    sections = {"resources": {"workers": workers}} | more.pop("sections", {})
    return job(base, data, root, sections, **SETTINGS | more)


def arguments_of(spec: JobSpec, folder: Path) -> tuple[Any, ...]:
    return ("--config", write(spec, folder), "-o", "json")


def intact(root: Path) -> list[int]:
    """Steps of the checkpoints; all of them must be whole."""
    store = CheckpointStore(Storage(str(root)), keep=2)
    assert [fault for step in store.steps() if (fault := fault_of(store.folder(step)))] == []
    return store.steps()


def heard(root: Path, text: str) -> bool:
    """Whether a notice of the job holds the text."""
    path = root / "events.jsonl"
    return path.exists() and any(text in event.get("text", "") for event in read_lines(path))


def shared_memory_files() -> set[Path]:
    """What is in shared memory."""
    return set(Path("/dev/shm").iterdir())


def nothing_left(sessions: set[int], shared_memory: set[Path]) -> None:
    """No process of the sessions and no new file in shared memory, within some seconds."""
    deadline = time.monotonic() + 30
    while (left := [one for session in sessions for one in processes_of(session)]) or (
        shared_memory_files() - shared_memory
    ):
        assert time.monotonic() < deadline, (left, shared_memory_files() - shared_memory)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The adapter of the same job with one worker, which nobody disturbs."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    run_engine(spec_of(tiny, tones, root))
    return saved_adapter(root / "adapter")


def assert_goes_on(finished: Finished, root: Path, expected: dict[str, Any]) -> None:
    """The same command ended well, at the bits of a run that nobody disturbed."""
    assert finished.code == 0, finished.stderr
    found = saved_adapter(root / "adapter")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert verify(Storage(str(root))).problems == []


@pytest.mark.parametrize(
    ("number", "code", "point", "program"),
    [
        pytest.param(signal.SIGINT, 130, "after the optimizer", CLI, marks=pytest.mark.faults),
        pytest.param(signal.SIGTERM, 4, "in evaluation", CLI, marks=pytest.mark.faults),
        pytest.param(signal.SIGHUP, 4, "before a step", JOB, marks=pytest.mark.faults),
    ],
)
def test_a_signal_stops_the_job_with_a_checkpoint(
    tiny: Path,
    tones: Path,
    tmp_path: Path,
    faults: Faults,
    undisturbed: Any,
    number: int,
    code: int,
    point: str,
    program: tuple[str, ...],
) -> None:
    """On a local Ray. To the client it is sent as a terminal or a supervisor does: to its whole process group."""
    shared_memory, root = shared_memory_files(), tmp_path / "run"
    path = write(spec_of(tiny, tones, root), tmp_path)
    arguments = ("run", path) if program == CLI else ("--config", path)
    faults.plan(point, "wait", count=2 if point == "in evaluation" else 5)
    process = faults.start(*arguments, "-o", "json", local=True, program=program)
    wait_until(lambda: faults.fired, process)
    sessions = {process.pid, *(child.pid for child in psutil.Process(process.pid).children())}
    if program == CLI:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    wait_until(lambda: heard(root, "stopping with a checkpoint"), process)
    time.sleep(0.5)  # the word travels to the workers
    faults.go()
    finished = faults.end(process)
    assert finished.code == code, finished.stderr
    step = max(intact(root))
    expected = f"stopped at step {step} of 28; its checkpoint is kept. The same command goes on from there"
    assert finished.error()["error"] == expected
    assert step not in (3, 6), "or no checkpoint was written for the stop"
    nothing_left(sessions, shared_memory)

    again = faults.run(*arguments, "-o", "json", program=program)
    assert f"going on from step {step} of 28" in again.stderr
    assert_goes_on(again, root, undisturbed)


@pytest.mark.faults
def test_a_signal_outside_the_training_ends_the_job_at_once(
    tiny: Path, tones: Path, tmp_path: Path, faults: Faults
) -> None:
    arguments = arguments_of(spec_of(tiny, tones, tmp_path / "run"), tmp_path)
    faults.plan("in the check of the data", "wait")
    process = faults.start(*arguments)
    wait_until(lambda: faults.fired, process)
    process.send_signal(signal.SIGTERM)
    finished = faults.end(process)
    assert finished.code == 4
    assert finished.error()["error"] == "stopped (SIGTERM). The same command goes on with what is done"
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.faults
def test_a_second_interrupt_ends_the_job_at_once(tiny: Path, tones: Path, tmp_path: Path, faults: Faults) -> None:
    shared_memory, root = shared_memory_files(), tmp_path / "run"
    faults.plan("before a step", "wait", count=5)
    process = faults.start(*arguments_of(spec_of(tiny, tones, root), tmp_path), local=True)
    wait_until(lambda: faults.fired, process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: heard(root, "stopping with a checkpoint"), process)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=5)
    finished = faults.end(process)
    assert finished.code == 130
    assert "error: ended at once. The same command goes on from the last checkpoint" in finished.stderr
    assert intact(root) == [3]
    nothing_left({process.pid}, shared_memory)


def test_a_second_run_is_refused_while_the_first_lives(tiny: Path, tones: Path, tmp_path: Path, faults: Faults) -> None:
    flags = ["kind=evaluate", f"evaluation.model={tiny}", f"evaluation.csv={tones / 'val.csv'}"]
    flags += ["evaluation.max_new_tokens=6", f"training.outdir={tmp_path / 'run'}"]
    arguments = [*(word for flag in flags for word in ("--set", flag)), "-o", "json"]
    faults.plan("in the check of the data", "wait")
    first = faults.start(*arguments)
    wait_until(lambda: faults.fired, first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for words in ([], ["--overwrite"]):
        second = Finished(*_ended(faults, *arguments, *words))
        assert second.code == 2
        assert f"another run is at work here (process {first.pid} on " in second.error()["error"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    faults.go()
    assert faults.end(first).code == 0
    assert not (tmp_path / "run" / LOCK).exists()


def _ended(faults: Faults, *arguments: Any) -> tuple[int, str, str, float]:
    """A job beside the one in which a fault is planned."""
    driver = (faults.folder / "driver.pid").read_text()
    finished = faults.run(*arguments)
    (faults.folder / "driver.pid").write_text(driver)
    return finished.code, finished.stdout, finished.stderr, 0.0


@pytest.mark.faults
def test_a_full_disk_ends_the_job_and_with_room_it_goes_on(
    tiny: Path, tones: Path, tmp_path: Path, faults: Faults, undisturbed: Any
) -> None:
    with small_disk(tmp_path / "disk", "2m"):
        root = tmp_path / "disk/run"
        arguments = arguments_of(spec_of(tiny, tones, root), tmp_path)
        finished = faults.run(*arguments)
        assert finished.code == 11
        assert "results cannot be written" in finished.error()["error"]
        assert "o space left on device" in finished.error()["error"]
        assert intact(root)
        subprocess.run(["mount", "-o", "remount,size=100m", tmp_path / "disk"], check=True)
        assert_goes_on(faults.run(*arguments), root, undisturbed)


@pytest.mark.faults
def test_a_read_only_root_is_refused_and_one_that_turns_so_ends_the_job(
    tiny: Path, tones: Path, tmp_path: Path, faults: Faults, undisturbed: Any
) -> None:
    with small_disk(tmp_path / "disk", "10m"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        refused = faults.run(*arguments_of(spec_of(tiny, tones, tmp_path / "disk/run"), tmp_path))
        assert refused.code == 2
        assert "cannot be written (Read-only file system); give another outdir" in refused.error()["error"]

    root = tmp_path / "run"
    arguments = arguments_of(spec_of(tiny, tones, root), tmp_path)
    faults.plan("before a step", "wait", count=5)
    process = faults.start(*arguments)
    wait_until(lambda: faults.fired, process)
    # Nobody, not even root, may write there. (A file system on which a run is at work cannot be made read-only.)
    if subprocess.run(["chattr", "+i", root / "checkpoints"], capture_output=True).returncode:
        process.kill()
        pytest.skip("making a folder immutable takes root and a file system that can")
    faults.go()
    finished = faults.end(process)
    subprocess.run(["chattr", "-i", root / "checkpoints"], check=True)
    assert finished.code == 11, finished.stderr
    assert "results cannot be written ([Errno 1] Operation not permitted" in finished.error()["error"]
    assert intact(root) == [3]
    assert_goes_on(faults.run(*arguments), root, undisturbed)


@pytest.mark.faults
def test_a_base_model_that_vanishes_is_named_and_put_back_the_job_goes_on(
    tiny: Path, tones: Path, tmp_path: Path, faults: Faults, undisturbed: Any
) -> None:
    base, root = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny, base)
    arguments = arguments_of(spec_of(base, tones, root), tmp_path)
    faults.plan("before the adapter is published", "wait")
    process = faults.start(*arguments)
    wait_until(lambda: faults.fired, process)
    (base / "model.safetensors").rename(tmp_path / "away")
    faults.go()
    finished = faults.end(process)
    assert finished.code == 15
    assert f'training.base_model: "{base}" is no complete Whisper checkpoint' in finished.error()["error"]
    assert "it was there when the job checked it. Put it back" in finished.error()["error"]
    assert 28 in intact(root)
    (tmp_path / "away").rename(base / "model.safetensors")
    assert_goes_on(faults.run(*arguments), root, undisturbed)


@pytest.mark.faults
def test_a_worker_out_of_memory_is_told_what_to_lower(
    tiny: Path, tones: Path, tmp_path: Path, faults: Faults, undisturbed: Any
) -> None:
    root = tmp_path / "run"
    arguments = arguments_of(spec_of(tiny, tones, root), tmp_path)
    faults.plan("before a step", "exhaust memory", count=5)
    finished = faults.run(*arguments)
    assert finished.code == 12
    assert "lower training.per_dev_batch" in finished.error()["error"]
    assert intact(root) == [3]
    assert_goes_on(faults.run(*arguments), root, undisturbed)


@pytest.mark.faults
def test_a_loss_that_is_no_number_ends_the_job(tiny: Path, tones: Path, tmp_path: Path, faults: Faults) -> None:
    base, norm = tmp_path / "base", "model.decoder.layer_norm.weight"
    shutil.copytree(tiny, base)
    state = load_file(base / "model.safetensors")
    save_file(state | {norm: state[norm] * 1e38}, base / "model.safetensors", metadata={"format": "pt"})
    finished = faults.run(*arguments_of(spec_of(base, tones, tmp_path / "run"), tmp_path))
    assert finished.code == 13
    assert "stopped before the optimizer step. Lower training.lr" in finished.error()["error"]
    assert " at step 1; " in finished.error()["error"]
    assert intact(tmp_path / "run") == []


@pytest.mark.faults
@pytest.mark.parametrize("workers", [2, 1])
def test_a_worker_that_hangs_ends_the_job_and_leaves_nothing(
    tiny: Path, tones: Path, tmp_path: Path, faults: Faults, workers: int
) -> None:
    """One of two is missed by the other in a collective; one alone, by the driver."""
    shared_memory, root = shared_memory_files(), tmp_path / "run"
    spec = spec_of(tiny, tones, root, workers, sections={"engine": {"timeout_s": 20, "report_to": []}})
    faults.plan("between gradients and optimizer", "stop this process", count=5, rank=workers - 1)
    process = faults.start(*arguments_of(spec, tmp_path), local=True)
    finished = faults.end(process)
    assert faults.fired
    assert finished.code == 14, finished.stderr
    assert "engine.timeout_s" in finished.error()["error"]
    assert intact(root) == [3]
    nothing_left({process.pid}, shared_memory)


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["driver", "gcs_server"])
def test_a_killed_job_on_this_machine_leaves_nothing(
    tiny: Path, tones: Path, tmp_path: Path, faults: Faults, victim: str
) -> None:
    shared_memory, root = shared_memory_files(), tmp_path / "run"
    faults.plan("before a step", "wait", count=5)
    path = write(spec_of(tiny, tones, root, workers=2), tmp_path)
    process = faults.start("run", path, program=CLI)
    wait_until(lambda: faults.fired, process)
    (driver,) = psutil.Process(process.pid).children()
    killed = driver if victim == "driver" else next(one for one in driver.children() if one.name() == victim)
    killed.kill()
    finished = faults.end(process)
    assert finished.code == (137 if victim == "driver" else 1), finished.stderr
    assert intact(root) == [3]
    nothing_left({process.pid, driver.pid}, shared_memory)


@pytest.mark.faults
def test_workers_that_die_again_and_again_end_the_job(tiny: Path, tones: Path, tmp_path: Path, faults: Faults) -> None:
    spec = spec_of(tiny, tones, tmp_path / "run", sections={"resources": {"workers": 1, "max_failures": 0}})
    faults.plan("before a step", "kill this process", count=5)
    finished = faults.run(*arguments_of(spec, tmp_path))
    assert finished.code == 16
    assert "a process of the job died" in finished.error()["error"]
    assert intact(tmp_path / "run") == [3]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("status", "code", "way_out"),
    [
        (403, "GatedRepo", "is gated: accept its terms on its hub page, then set HF_TOKEN"),
        (404, "RepoNotFound", "is not on the hub, or is private: check the name, or set HF_TOKEN"),
    ],
)
def test_a_model_that_the_hub_refuses_says_what_to_do(
    tones: Path, tmp_path: Path, faults: Faults, status: int, code: str, way_out: str
) -> None:
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *words: Any) -> None:
            """Nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        hub["HF_HOME"] = str(tmp_path / "cache")
        spec = spec_of(Path("someone/whisper-of-theirs"), tones, tmp_path / "run")
        finished = faults.run(*arguments_of(spec, tmp_path), local=True, **hub)
        server.shutdown()
    assert finished.code == 2, finished.stderr
    (fault,) = finished.error()["faults"]
    assert fault["where"] == "training.base_model"
    assert way_out in fault["message"]
    assert json.loads((tmp_path / "run/spec.json").read_text())["training"]["base_model"] == "someone/whisper-of-theirs"
    assert steps_of(tmp_path / "run", "step") == []
