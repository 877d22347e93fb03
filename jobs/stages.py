"""Stages of a job: each leaves its result under the root, and one whose result stands is passed over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from jobs.failures import root_not_writable
from service import artifacts
from service.errors import Fault, InputError, NotFoundError
from service.spec.job import JobSpec, differing
from service.storage import Storage

STAGES = "stages"
FIRST_STAGE = "prepare"

OURS = (
    artifacts.MANIFEST,  # first, so that a half-deleted run never looks complete
    STAGES,
    artifacts.EVENTS,
    artifacts.METRICS,
    artifacts.CARD,
    artifacts.REPORT,
    artifacts.REJECTS,
    artifacts.DATA,
    artifacts.EVALUATION,
    artifacts.CHECKPOINTS,
    artifacts.TENSORBOARD,
    artifacts.SEARCH,
    artifacts.ADAPTER,
    artifacts.MERGED,
    artifacts.EXPORTS,
    artifacts.SPEC,  # last: it says that all of this is a run's
)
"""What a run writes under its root, and so what `--overwrite` deletes, in this order. Other files are left alone."""


def claim_root(spec: JobSpec, root: Storage, *, overwrite: bool) -> None:
    """Make a root the place of this job: new, or a run of the same spec to go on with. The caller holds its lock.

    Raises:
        InputError: it holds a run of another spec, or files that are no run's, and there is no word to overwrite it.
    """
    root.sweep()
    if overwrite and root.exists(artifacts.SPEC):
        for name in OURS:
            root.remove(name)
    if root.exists(artifacts.SPEC):
        try:
            before = JobSpec.model_validate(root.read_json(artifacts.SPEC))
        except ValueError:
            raise InputError(
                [
                    Fault(
                        root.path(artifacts.SPEC), "cannot be read by this version; give another outdir, or --overwrite"
                    )
                ]
            ) from None
        if before.sha256 != spec.sha256 and has_begun(root):
            raise InputError(
                [
                    Fault(
                        root.path(),
                        f"holds a run of another spec (it differs in {', '.join(differing(before, spec))}); give "
                        "another outdir, or --overwrite to delete that run",
                    )
                ]
            )
        if before.sha256 != spec.sha256:
            root.write_text(artifacts.SPEC, spec.to_json())  # nothing was done under the old one
        return
    if not overwrite and next(root.files(), None):
        way_out = "give another outdir, or --overwrite to write beside it"
        raise InputError([Fault(root.path(), f"is not empty and holds no run; {way_out}")])
    # What no run of ours has left there is not ours to delete.
    if taken := [name for name in OURS if root.exists(name)]:
        raise InputError([Fault(root.path(), f"holds {taken[0]}, but no run; give another outdir, or move it away")])
    try:
        root.write_text(artifacts.SPEC, spec.to_json())
    except OSError as error:
        raise root_not_writable(root.path(), error) from error


def holds_run_of(spec: JobSpec, root: Storage) -> bool:
    """Whether the root's spec is this one."""
    try:
        return JobSpec.model_validate(root.read_json(artifacts.SPEC)).sha256 == spec.sha256
    except (ValueError, NotFoundError):
        return False


def has_begun(root: Storage) -> bool:
    """Whether a run has got past the check of its data: before that, a mended spec or manifest is simply taken."""
    return root.exists(f"{STAGES}/{FIRST_STAGE}.json")


class Stages:
    """Runs stages in order.

    Args:
        root: the run's root.
        emit: takes events.
    """

    def __init__(self, root: Storage, emit: Callable[[dict[str, Any]], None]) -> None:
        self._root, self._emit = root, emit
        self.seconds: dict[str, float] = {}

    def all_seconds(self) -> dict[str, float]:
        """Seconds of each stage, and their total."""
        return self.seconds | {"total": round(sum(self.seconds.values()), 3)}

    def kept(self, stage: str) -> dict[str, Any] | None:
        """The result that a stage has left; None: it has not been done."""
        name = f"{STAGES}/{stage}.json"
        return dict(self._root.read_json(name)["result"]) if self._root.exists(name) else None

    def run(self, stage: str, text: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage, or read the result that it left before.

        Args:
            stage: its name.
            text: what it does, for people.
            work: does it; its result must be JSON.
        """
        name = f"{STAGES}/{stage}.json"
        if self._root.exists(name):
            kept = self._root.read_json(name)
            self.seconds[stage] = kept["seconds"]
            self._emit({"event": "stage", "stage": stage, "status": "skipped"})
            return dict(kept["result"])
        self._emit({"event": "stage", "stage": stage, "status": "started", "text": text})
        started = time.monotonic()
        result = work()
        self.seconds[stage] = round(time.monotonic() - started, 3)
        self._root.write_json(name, {"seconds": self.seconds[stage], "result": result})
        self._emit({"event": "stage", "stage": stage, "status": "done", "seconds": self.seconds[stage]})
        return result
