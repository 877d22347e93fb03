"""What every benchmark reports beside its times: memory, machine, versions, and the share of a GPU that was used."""

from __future__ import annotations

import contextlib
import platform
import sys
import threading
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

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
"""Dense bf16, by what a GPU's name has in it."""


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    return None if peak is None else round(work[kind] * windows_per_s / peak, 3)


def averaged(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """One thing measured in several turns: what the last one found, with the mean of their seconds. (The quickest would
    favour what is short: a shared machine is seldom quick for long.)"""
    seconds = [turn["seconds"] for turn in turns]
    return turns[-1] | {"seconds": sum(seconds) / len(seconds), "seconds_of_turns": seconds}


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most memory in use meanwhile, in bytes, as the list's one item: of the GPU's allocator, or of the process."""
    found, over = [0], threading.Event()
    if torch.cuda.is_available():
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
