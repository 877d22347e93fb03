"""Where tensors of one shape are kept: memory of a device, main memory, a file. Each takes them until it is full.

A place that is full, or fails, takes no more and says so: the next one is asked then. What was put stays, and may be
read by several threads at once; whoever puts must be alone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

import psutil
import torch
from torch import Tensor

from service.storage.transfer import write_at

SLAB_BYTES = 2**28
"""Memory is taken in pieces of this size at most: torch rounds pinned memory up to a power of two."""

SLAB_ROWS = 256

MEMORY_SYSTEMS = ("tmpfs", "ramfs")
"""File systems that hold their files in main memory."""


class Place(Protocol):
    """Takes rows until it is full.

    Attributes:
        name: what it is, in words.
        rows: how many it has taken.
        trouble: why it takes no more, where that is not for lack of room; empty: there was none.
    """

    name: str
    rows: int
    trouble: str

    def put(self, row: Tensor) -> int | None:
        """Keep a copy; returns the number to `get` it by. None: there is no room."""

    def get(self, number: int) -> Tensor:
        """What was put, where it lies in memory; of a file, read into main memory.

        Raises:
            OSError: the file cannot be read.
        """


class Memory:
    """Memory, taken in slabs.

    Args:
        name: what it is, in words.
        device: whose.
        limit: bytes that it may take; may be raised later.
        spare: bytes that it may take now beside that.
        pinned: main memory that a GPU copies from by itself.

    Attributes:
        taken: bytes that it has taken.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        limit: int,
        spare: Callable[[], int] | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self.name, self.limit, self.rows, self.trouble = name, limit, 0, ""
        self._device, self._spare, self._pinned = device, spare, pinned
        self._slots: list[Tensor] = []
        self.taken = 0

    def put(self, row: Tensor) -> int | None:
        """See Place."""
        if self.rows == len(self._slots) and not self._grow(row):
            return None
        self._slots[self.rows].copy_(row)
        self.rows += 1
        return self.rows - 1

    def get(self, number: int) -> Tensor:
        """See Place."""
        return self._slots[number]

    def _grow(self, like: Tensor) -> bool:
        if self.trouble:
            return False
        size, left = _bytes_of(like), self.limit - self.taken
        if left >= size and self._spare is not None:
            left = min(left, self._spare())
        count = min(SLAB_ROWS, max(1, SLAB_BYTES // size), left // size)
        if count < 1:
            return False
        try:
            slab = torch.empty((count, *like.shape), dtype=like.dtype, device=self._device, pin_memory=self._pinned)
        except RuntimeError as error:  # there is less than there seemed to be
            self.trouble = str(error).split("\n", 1)[0]
            return False
        self.taken += count * size
        self._slots += slab.unbind()
        return True


class DeviceMemory(Memory):
    """Memory of a GPU, none of which is taken before training has shown how much it needs itself.

    Args:
        device: the GPU.
        limit: bytes that it may take; None: half of what training leaves.
        share: of the GPU, which is this process's.

    Attributes:
        needed: bytes that training is known to come to, where it has not shown it yet.
    """

    def __init__(self, device: torch.device, limit: int | None, share: float = 1.0) -> None:
        super().__init__("in the GPU's memory", device, limit or 0)
        self._automatic, self._share, self.needed = limit is None, share, 0

    def settle(self) -> None:
        """Take half of what has never been in use."""
        if not self._automatic:
            return
        self._automatic = False
        free, total = torch.cuda.mem_get_info(self._device)
        ours = torch.cuda.memory_reserved(self._device)
        peak = max(self.needed, torch.cuda.max_memory_allocated(self._device))
        self.limit = max(0, min(free + ours, round(self._share * total)) - peak) // 2


class Disk:
    """A file without a name: however the process ends, its space is free again.

    Written and read by calls, not mapped: a full disk or a broken one is an error then, not a signal that kills.

    Args:
        folder: where the file lies.
        limit: bytes that it may take.
        reserve: bytes of the disk that stay free.
        pinned: whether what is read lies in memory that a GPU copies from by itself.
    """

    def __init__(self, folder: Path, limit: int, reserve: int, *, pinned: bool = False) -> None:
        self._limit = limit
        self.name, self.rows, self.trouble = "on disk", 0, ""
        self._folder, self._reserve, self._pinned = folder, reserve, pinned
        self._file: IO[bytes] | None = None
        self._like = torch.empty(0)

    def put(self, row: Tensor) -> int | None:
        """See Place."""
        size = _bytes_of(row)
        if self.trouble or (self.rows + 1) * size > self._limit:
            return None
        try:
            file = self._file or self._open(row)
            found = os.fstatvfs(file.fileno())
            if found.f_bavail * found.f_frsize - size < self._reserve:
                return None
            write_at(file.fileno(), _as_bytes(row.detach().to("cpu").contiguous()).numpy().data, self.rows * size)
        except OSError as error:
            self.trouble = f"{self._folder}: {error.strerror or error}"
            return None
        self.rows += 1
        return self.rows - 1

    def get(self, number: int) -> Tensor:
        """See Place."""
        assert self._file is not None, "nothing was put"
        row = torch.empty(self._like.shape, dtype=self._like.dtype, pin_memory=self._pinned)
        content, size, done = _as_bytes(row).numpy().data, _bytes_of(row), 0
        while done < size:
            count = os.preadv(self._file.fileno(), [content[done:]], number * size + done)
            if not count:
                raise OSError(f"{self._folder}: a kept row has been cut off")
            done += count
        return row

    def _open(self, row: Tensor) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._like = torch.empty_like(row, device="meta")
        self._file = tempfile.TemporaryFile(dir=self._folder, prefix="encoder-outputs-")  # noqa: SIM115  # as long as self
        return self._file


def is_in_memory(folder: Path) -> bool:
    """Whether a folder lies on a file system that is no disk."""
    place = folder.resolve()
    found = [each for each in psutil.disk_partitions(all=True) if place.is_relative_to(each.mountpoint)]
    return bool(found) and max(found, key=lambda each: len(each.mountpoint)).fstype in MEMORY_SYSTEMS


def available_memory() -> int:
    """Bytes of main memory that this process may still take: its node's, or what is left of its container's."""
    return min([int(psutil.virtual_memory().available), *_left_in_container()])


def share_of_memory(asked_gb: float | None) -> tuple[int, Callable[[], int] | None]:
    """What a worker may take of main memory for what it would else compute anew.

    Args:
        asked_gb: what the spec says, in GB; None: a quarter of what is free now.

    Returns:
        the most bytes, and how many may be taken now beside that.
    """
    if asked_gb is not None:
        return round(asked_gb * 1e9), None
    available = available_memory()
    # Other workers of the node take theirs at the same time: half of what there was stays, whoever takes it.
    return available // 4, lambda: max(0, available_memory() - available // 2)


def _left_in_container() -> list[int]:
    # Of the page cache, what was not used lately is given back when memory is wanted.
    base = Path("/sys/fs/cgroup")
    files = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    )
    found = []
    for limit, usage, reclaimable in files:
        with contextlib.suppress(OSError, ValueError):  # no such version of cgroups, or no limit ("max")
            most, used = (int((base / name).read_text()) for name in (limit, usage))
            lines = (base / usage).with_name("memory.stat").read_text().splitlines()
            cached = sum(int(line.split()[1]) for line in lines if line.startswith(f"{reclaimable} "))
            found.append(max(0, most - used + cached))
    return found


def _bytes_of(row: Tensor) -> int:
    return row.numel() * row.element_size()


def _as_bytes(row: Tensor) -> Tensor:
    return row.flatten().view(torch.uint8)
