"""Checkpoints of a run on its storage: written aside, sealed with hashes, renamed; one that is torn is passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.artifacts import CHECKPOINTS
from service.errors import NotFoundError, VerificationError
from service.storage import Storage, sha256_of

SEAL = "checkpoint.json"
"""Size and SHA-256 of every other file of the checkpoint."""

Write = Callable[[Path], None]
"""Fills a folder with a checkpoint."""


class CheckpointStore:
    """The checkpoints of one run, by step.

    Ray Train could keep them, but copies them file by file into their final place, knows nothing of their content, and
    goes on from the newest one alone, whatever its state.

    Args:
        storage: the run's root.
        keep: how many of the last ones stay.
        tell: takes a line for whoever watches.
    """

    def __init__(self, storage: Storage, keep: int, tell: Callable[[str], None] = lambda text: None) -> None:
        self._storage, self._keep, self._tell = storage, keep, tell

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in order, torn ones too."""
        names = self._storage.folders(CHECKPOINTS)
        return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())

    def save(self, step: int, write: Write) -> None:
        """Keep a checkpoint, and remove those that are too many."""
        keep_sealed(self._storage, _name(step), write)
        for old in self.steps()[: -self._keep]:
            self._storage.remove(_name(old))

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint; torn ones are named and passed over."""
        for step in reversed(self.steps()):
            fault = fault_in(self._storage, _name(step))
            if fault is None:
                return step
            self._tell(f"checkpoint {step} is passed over: {fault}")
        return None

    def folder(self, step: int) -> Path:
        """A checkpoint's files, on this machine."""
        return self._storage.fetch(_name(step))


def keep_sealed(storage: Storage, name: str, write: Write) -> None:
    """Keep a folder with its seal."""
    with storage.new_folder(name, last=SEAL) as folder:
        write(folder)
        seal(folder)


def fault_in(storage: Storage, name: str) -> str | None:
    """What is wrong with a sealed folder below a root; None: nothing."""
    if not storage.exists(f"{name}/{SEAL}"):  # nothing of it need come here
        return f"it is not complete (no {SEAL})"
    try:
        return fault_of(storage.fetch(name))
    except (NotFoundError, VerificationError) as error:
        return str(error)


def seal(folder: Path) -> None:
    """Write down what a folder's files are."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    content = {name: [path.stat().st_size, sha256_of(path)] for name, path in files.items() if name != SEAL}
    (folder / SEAL).write_text(json.dumps({"files": content}, indent=2) + "\n")


def fault_of(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None: nothing."""
    try:
        content: dict[str, Any] = json.loads((folder / SEAL).read_text())
        for name, (size, digest) in content["files"].items():
            path = folder / name
            if path.stat().st_size != size or sha256_of(path) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is not complete ({error})"
    return None


_PREFIX = "checkpoint-"


def _name(step: int) -> str:
    return f"{CHECKPOINTS}/{_PREFIX}{step}"
