"""What every benchmark reports beside its times: memory, machine, versions, and the share of a GPU that was used; and
the time of a training's steps."""

from __future__ import annotations

import contextlib
import gc
import platform
import sys
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import psutil
import torch

TFLOP_PER_WINDOW = {
    "turbo": {"lora": 5.02, "decoder": 2.36, "kept": 0.086},
    "large-v3": {"lora": 5.78, "decoder": 2.84, "kept": 0.568},
    "small": {"lora": 0.896, "decoder": 0.433, "kept": 0.089},
}
"""Floating-point work of a 30 s window, forward and backward, with 64 label tokens: adapters in encoder and decoder, in
the decoder alone, and the latter with the encoder's output at hand."""

PEAK_TFLOPS = {
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H200": 989.0,
}
"""Dense bf16 as NVIDIA's data sheets have it, by a GPU's whole name: cards of one generation differ. The first is the
H100 of SXM boards."""

WARM_UP = 8
"""Steps of a training that do not count, where it is at least four times as long."""


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Device and versions, as a result file has them."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }


def command() -> str:
    """The command that is running, for a result file."""
    return " ".join(["python", "tests/benchmarks/" + sys.argv[0].rsplit("/", 1)[-1], *sys.argv[1:]])


def mfu(shape: str, kind: str, windows_per_s: float) -> float | None:
    """Model FLOPs utilisation: the share of the GPU's peak in bf16; None: not known for this device or shape."""
    work = TFLOP_PER_WINDOW.get(shape)
    if not torch.cuda.is_available() or work is None:
        return None
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name())
    return None if peak is None else round(work[kind] * windows_per_s / peak, 3)


class Pace:
    """The time of a training's steps without the first ones, in which kernels are chosen, memory is taken, and what
    reads clips begins. Without loading, checkpoints and a last evaluation too: where a step is short, they are most of
    a run."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._steps = 0

    def tell(self, step: int, steps: int) -> None:
        """Of a step (1, 2, ...) that was made, of so many."""
        if step in (warm_up(steps), steps):
            wait()
            self._times.append(time.perf_counter())
            self._steps = steps - warm_up(steps)

    @property
    def step_seconds(self) -> float | None:
        """Mean of a step; None: there was no more than one."""
        return (self._times[-1] - self._times[0]) / self._steps if self._steps else None


def warm_up(steps: int) -> int:
    """How many of a training's steps do not count."""
    return max(1, min(WARM_UP, steps // 4))


def averaged(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """One thing measured in several turns: what the last one found, with the mean of their seconds, and of those of a
    step. (The quickest would favour what is short: a shared machine is seldom quick for long.)"""
    seconds = [turn["seconds"] for turn in turns]
    found = turns[-1] | {"seconds": sum(seconds) / len(seconds), "seconds_of_turns": seconds}
    of_steps = [turn["step_seconds"] for turn in turns if turn.get("step_seconds") is not None]
    return found | ({"step_seconds": sum(of_steps) / len(of_steps)} if of_steps else {})


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most memory in use meanwhile, in bytes, as the list's one item: of the GPU's allocator, or of the process."""
    found, over = [0], threading.Event()
    if torch.cuda.is_available():
        gc.collect()  # a model of an earlier side may be held by nothing but itself
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found[0] = torch.cuda.max_memory_allocated()
        return

    def watch() -> None:
        process = psutil.Process()
        while not over.wait(0.05):
            found[0] = max(found[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
