"""Places keep what they are given, to the last bit, until they are full; then they say so, and what they have stays."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from disks import small_disk
from torch import Tensor

from jobs.fast.places import DeviceMemory, Disk, Memory, Place, available_memory, is_in_memory
from jobs.train.kept import make_outputs, origin_of
from service.spec.job import JobSpec

CPU = torch.device("cpu")
NEVER_FULL = -(10**18)
"""A reserve that lets the disk itself say that it is full."""


def row(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_to_the_last_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    place: Place = Memory("here", CPU, 10**6) if kind == "memory" else Disk(tmp_path / "new", 10**6, 0)
    numbers = [place.put(row(number, dtype)) for number in range(300)]
    assert numbers == list(range(300))
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(place.get, range(300))):
            assert found.dtype == dtype
            assert torch.equal(found, row(number, dtype))
    assert (place.rows, place.trouble) == (300, "")


@pytest.mark.parametrize(("limit", "rows"), [(0, 0), (139, 0), (140, 1), (140 * 9 + 139, 9), (140 * 300, 300)])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_place_takes_no_more_than_its_limit(tmp_path: Path, kind: str, limit: int, rows: int) -> None:
    place: Place = Memory("here", CPU, limit) if kind == "memory" else Disk(tmp_path, limit, 0)
    found = [place.put(row(number)) for number in range(301)]
    assert found == [*range(rows), *[None] * (301 - rows)]
    assert (place.rows, place.trouble) == (rows, "")


def test_memory_that_others_want_is_left_to_them() -> None:
    spare = [140 * 3, 0, 140 * 2]
    place = Memory("here", CPU, 10**6, lambda: spare.pop(0))
    assert [place.put(row(number)) for number in range(6)] == [0, 1, 2, None, 3, 4]


def test_memory_that_cannot_be_had_is_no_error() -> None:
    place = Memory("here", CPU, 2**62, pinned=False)
    assert place.put(torch.empty(2**58, device="meta")) is None
    assert place.trouble
    assert place.put(row(0)) is None


def test_a_reserve_of_the_disk_stays_free(tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    place = Disk(tmp_path, 10**6, found.f_blocks * found.f_frsize)
    assert place.put(row(0)) is None
    assert (place.rows, place.trouble) == (0, "")


def test_a_disk_that_is_full_keeps_what_it_has(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k"):
        place = Disk(tmp_path / "disk", 10**6, NEVER_FULL)
        numbers = [place.put(row(number)) for number in range(1000)]
        assert 400 < place.rows < 500
        assert numbers[place.rows :] == [None] * (1000 - place.rows)
        assert place.trouble == f"{tmp_path / 'disk'}: No space left on device"
        assert all(torch.equal(place.get(number), row(number)) for number in range(place.rows))


def test_a_folder_that_is_none_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = Disk(tmp_path / "file", 10**6, 0)
    assert place.put(row(0)) is None
    assert place.trouble == f"{tmp_path / 'file'}: File exists"


def test_a_row_that_was_cut_off_is_told(tmp_path: Path) -> None:
    place = Disk(tmp_path, 10**6, 0)
    place.put(row(0))
    assert place._file is not None
    place._file.truncate(10)
    with pytest.raises(OSError, match="has been cut off"):
        place.get(0)


def test_a_kept_row_that_cannot_be_read_is_computed_anew(tmp_path: Path) -> None:
    from jobs.fast.encoder_outputs import EncoderOutputs, Origin

    place = Disk(tmp_path, 10**6, 0)
    outputs = EncoderOutputs(Origin("base", None, "sdpa", "no", "cpu", (("train", "sha"),)), CPU, [place])
    outputs.keep("train", 3, row(3))
    assert outputs.rows() == {"train": 1}
    assert place._file is not None
    place._file.truncate(0)
    assert outputs.of("train").look_up([3]).missing == [0]
    assert outputs.rows() == {}
    assert outputs.troubles() == [f"{tmp_path}: a kept row has been cut off"]
    with pytest.raises(ValueError, match="not of 'test'"):
        outputs.of("test")


def test_a_file_system_in_memory_is_no_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k"):
        assert is_in_memory(tmp_path / "disk")
        assert is_in_memory(tmp_path / "disk/folder/below")
    assert not is_in_memory(Path("/proc/self"))


def test_available_memory_is_some_of_the_nodes() -> None:
    import psutil

    assert 0 < available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        ("auto", ["in main memory", "on disk"]), ("device", ["in main memory"]), ("host", ["in main memory"]),
        ("disk", ["on disk"]),
    ],
)  # fmt: skip
def test_the_spec_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str, names: list[str]) -> None:
    monkeypatch.setattr("jobs.train.kept.is_in_memory", lambda folder: False)  # of this machine's cache
    spec = JobSpec.model_validate({"training": {"base_model": "x"}, "engine": {"keep_encoder": keep}})
    (tmp_path / "rows").write_text("")
    origin = origin_of(spec, {"train": str(tmp_path / "rows")}, "abc", CPU, "no")
    outputs = make_outputs(spec, origin, CPU)
    assert [place.name for place in outputs.places] == names
    assert outputs.origin == origin_of(spec, {"train": str(tmp_path / "rows")}, "abc", CPU, "no")
    (tmp_path / "rows").write_text("other")
    assert outputs.origin != origin_of(spec, {"train": str(tmp_path / "rows")}, "abc", CPU, "no")


@pytest.mark.parametrize(("share", "limit"), [(1.0, 35), (0.25, 5)])
def test_of_a_gpu_that_is_shared_outputs_take_half_of_what_is_left_of_the_own_part(
    monkeypatch: pytest.MonkeyPatch, share: float, limit: int
) -> None:
    """80 GB, of which 70 are free and 10 this process's own, which training needs."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)
    memory = DeviceMemory(torch.device("cuda"), None, share)
    memory.settle()
    assert memory.limit == limit
