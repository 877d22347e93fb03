"""What libraries raise is told apart, and what ended a group of workers is told from what only followed."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from disks import small_disk
from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from safetensors.torch import save_file

from jobs.failures import GO_ON, explain, explain_alone, inputs_that_were_there
from jobs.train.on_ray import cause_of
from service.errors import (
    DivergedError,
    Fault,
    HungError,
    InputLostError,
    JobFailedError,
    OutOfMemoryError,
    SpecError,
    StoppedError,
    StorageError,
    WhisperJobsError,
    WorkerLostError,
)
from service.storage import Storage


def raised(work: Any) -> BaseException:
    """What a call raises."""
    with pytest.raises(BaseException) as caught:
        work()
    return caught.value


def write_arrow(path: Path) -> None:
    rows = pa.record_batch({"a": pa.array(range(1 << 18))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_batch(rows)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "Python": lambda path: path.write_bytes(bytes(1 << 20)),
    "Storage": lambda path: Storage(str(path.parent)).write_bytes(path.name, bytes(1 << 20)),
    "Arrow": write_arrow,
    "safetensors": lambda path: save_file({"a": torch.zeros(1 << 20)}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_known_whoever_writes(name: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "512k"):
        error = explain(raised(lambda: WRITERS[name](tmp_path / "disk/file")))
    assert type(error) is StorageError
    assert "make room" in str(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_keeps_a_file_from_being_written_is_a_storage_error(number: int) -> None:
    assert type(explain(OSError(number, "because"))) is StorageError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), OutOfMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemoryError),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:4711"), WorkerLostError),
        (RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation"), HungError),
        (RuntimeError("NCCL watchdog: collective operation timeout: WorkNCCL(SeqNum=8)"), HungError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), JobFailedError),
        (FileNotFoundError(errno.ENOENT, "No such file"), JobFailedError),
        (DivergedError("x"), DivergedError),
    ],
)
def test_each_way_to_fail_has_its_error(error: Exception, kind: type[WhisperJobsError]) -> None:
    assert type(explain(error)) is kind


def test_memory_that_torch_cannot_get_is_known() -> None:
    assert type(explain(raised(lambda: torch.empty(1 << 60, dtype=torch.uint8)))) is OutOfMemoryError


def test_a_command_without_checkpoints_is_not_told_to_go_on_from_one() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert str(explain(full)).endswith(GO_ON)
    assert str(explain_alone(full)).endswith("make room or allow it")
    assert explain_alone(DivergedError(f"x. {GO_ON}")).args == (f"x. {GO_ON}",)


def test_an_input_that_is_gone_is_no_fault_of_the_spec() -> None:
    gone = r"^training\.base_model: gone; it was there"
    with pytest.raises(InputLostError, match=gone) as caught, inputs_that_were_there():
        raise SpecError([Fault("training.base_model", "gone")])
    assert caught.value.exit_code == 15
    with pytest.raises(io.UnsupportedOperation), inputs_that_were_there():
        raise io.UnsupportedOperation


def group(*failures: BaseException) -> WorkerGroupError:
    """Ray Train's error for workers 0, 1, ... that raised these."""
    return WorkerGroupError("", dict(enumerate(failures)))  # type: ignore[arg-type]


DEATH = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.RayActorError())
FOLLOWS = WorkerLostError("lost its connection")


@pytest.mark.parametrize(
    ("failures", "kind"),
    [
        ((FOLLOWS, DEATH), WorkerLostError),
        ((FOLLOWS,), WorkerLostError),
        ((FOLLOWS, StoppedError("stopped")), StoppedError),
        ((FOLLOWS, DivergedError("nan")), DivergedError),
        ((FOLLOWS, JobFailedError("KeyError: x")), JobFailedError),
        ((HungError("silent"), FOLLOWS), HungError),
        ((DEATH, HungError("silent")), WorkerLostError),
        ((StorageError("full"), DEATH), StorageError),
        ((SpecError("bad"), DEATH), SpecError),
    ],
)
def test_the_cause_is_told_from_what_followed(failures: tuple[BaseException, ...], kind: type) -> None:
    assert type(cause_of(group(*failures))) is kind


def test_a_controller_that_dies_is_a_lost_worker() -> None:
    assert type(cause_of(ray.exceptions.RayActorError())) is WorkerLostError
    assert type(cause_of(ControllerError(ValueError("cannot be placed")))) is JobFailedError
    assert isinstance(ControllerError(ValueError()), TrainingFailedError)
