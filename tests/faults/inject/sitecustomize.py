"""Faults at exact moments in real processes: Python imports this at its start wherever this folder is on PYTHONPATH.

The folder WHISPER_JOBS_FAULTS holds plan.json: {"point", "count", "rank", "action"}. Each process counts its calls of
every point; the first one whose count (and rank, where one is given) is reached does the action, once.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("WHISPER_JOBS_FAULTS", "/nonexistent"))

POINTS = {
    "before a step": ("jobs.train.loop", "Trainer._step", "before"),
    "between gradients and optimizer": ("jobs.distributed", "sum_gradients", "after"),
    "after the optimizer": ("jobs.train.step_log", "StepLog.tell", "before"),
    "in evaluation": ("jobs.transcribe", "Greedy.__call__", "before"),
    "after the adapter of a checkpoint": ("jobs.train.checkpoint", "save_adapter", "after"),
    "before the seal of a checkpoint": ("jobs.train.store", "seal", "before"),
    "before the renaming of a checkpoint": ("jobs.train.store", "seal", "after"),
    "before the removal of a checkpoint": ("service.storage", "Storage.remove", "before"),
    "before the adapter is published": ("jobs.train.loop", "require_coverage", "before"),
    "before the merged model is saved": ("jobs.merge", "write_hf", "before"),
    "before the merged model is renamed": ("jobs.merge", "write_hf", "after"),
    "in the proof of the merged model": ("jobs.merge", "_prove", "before"),
    "before an export is published": ("jobs.export.ggml", "write_ggml", "after"),
    "in the proof of an export": ("jobs.export.artifact", "hear", "before"),
    "after a stage, before its result is kept": ("service.storage", "Storage.write_json", "before"),
    "before metrics.json": ("jobs.job", "publish", "before"),
    "before manifest.json": ("service.artifacts", "file_records", "after"),
    "in the check of the data": ("jobs.prepare", "_settle", "before"),
}


def kill(pid: int) -> None:
    """End a process without a word."""
    os.kill(pid, signal.SIGKILL)


def driver() -> int:
    """The job's own process."""
    return int((FOLDER / "driver.pid").read_text())


def controller() -> int:
    """Ray Train's controller of the job."""
    return int((FOLDER / "controller.pid").read_text())


def exhaust_memory() -> None:
    """Let this process have no more memory than it holds now."""
    import resource

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held, held))
    bytearray(1 << 34)


def wait_for_word() -> None:
    """Hold the process here until the test says so."""
    deadline = time.monotonic() + 120
    while not (FOLDER / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)


ACTIONS: dict[str, Callable[[], Any]] = {
    "kill this process": lambda: kill(os.getpid()),
    "kill the driver": lambda: kill(driver()),
    "kill the controller": lambda: kill(controller()),
    "stop this process": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "interrupt the driver": lambda: os.kill(driver(), signal.SIGINT),
    "terminate the driver": lambda: os.kill(driver(), signal.SIGTERM),
    "exhaust memory": exhaust_memory,
    "wait": wait_for_word,
}

calls: Counter[str] = Counter()


def rank() -> int:
    """This worker's number; 0 where there is but one process."""
    distributed = sys.modules.get("torch.distributed")
    return distributed.get_rank() if distributed and distributed.is_initialized() else 0


def reached(point: str) -> None:
    """Count a call of a point, and do what is planned for it."""
    calls[point] += 1
    try:
        plan = json.loads((FOLDER / "plan.json").read_text())
    except (OSError, ValueError):
        return
    if plan["point"] != point or calls[point] < plan["count"] or plan.get("rank", rank()) != rank():
        return
    try:
        os.close(os.open(FOLDER / "fired", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    (FOLDER / "fired").write_text(json.dumps({"pid": os.getpid()}))
    ACTIONS[plan["action"]]()


def wrapped(function: Callable[..., Any], point: str, when: str) -> Callable[..., Any]:
    """A function that reaches a point before or after it."""

    def call(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            reached(point)
        result = function(*arguments, **named)
        if when == "after":
            reached(point)
        return result

    return call


def instrument(module: ModuleType) -> None:
    """Put the points of a module in their places."""
    for point, (name, function, when) in POINTS.items():
        if name == module.__name__:
            *owners, attribute = function.split(".")
            owner: Any = module
            for part in owners:
                owner = getattr(owner, part)
            setattr(owner, attribute, wrapped(getattr(owner, attribute), point, when))
    if module.__name__ == CONTROLLER:
        run = module.TrainController.run

        async def note(self: Any, *arguments: Any) -> Any:
            (FOLDER / "controller.pid").write_text(str(os.getpid()))
            return await run(self, *arguments)

        module.TrainController.run = note


CONTROLLER = "ray.train.v2._internal.execution.controller.controller"


class Loader(importlib.abc.Loader):
    """Loads a module as ever, then instruments it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        instrument(module)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that hold points."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name not in WANTED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:  # an editable install has a finder of its own
            others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
            spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader)
        return spec


if FOLDER.is_dir():
    WANTED = {name for name, _, _ in POINTS.values()} | {CONTROLLER}
    sys.meta_path.insert(0, Finder())
