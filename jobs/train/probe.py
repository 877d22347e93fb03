"""Forward and backward passes before the training, of the longest audio and labels: which size of them has room."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from jobs.batches import Batch
from jobs.train.checkpoint import random_states, restore_random_states
from jobs.train.pass_size import PROBE, Choice, Passes, largest, largest_that_runs, limited, room_on_gpu
from jobs.train.runtime import Runtime
from jobs.train.step import forward_loss


def probed(
    passes: Passes,
    model: Any,
    parameters: Sequence[nn.Parameter],
    runtime: Runtime,
    *,
    frames: int,
    kept_bytes: int = 0,
) -> Choice:
    """The choice by a probe of the GPU that the model is on; model and random numbers are left as they are.

    Args:
        passes: the run's.
        model: as it is trained: a PeftModel with its adapters, without gradients.
        parameters: those that are trained.
        runtime: what the worker computes with.
        frames: of a window's features.
        kept_bytes: of encoder outputs that lie in the GPU's memory already.
    """
    device, sizes = runtime.device, passes.spec.training.pass_sizes
    peaks: dict[int, int] = {}
    before = torch.cuda.max_memory_allocated(device)

    def run(size: int) -> None:
        torch.cuda.reset_peak_memory_stats(device)
        one_pass(passes, passes.windows(size), model, parameters, runtime, frames)
        peaks[size] = torch.cuda.max_memory_allocated(device)

    def tidy() -> None:
        forget_gradients(parameters)
        gc.collect()
        torch.cuda.empty_cache()

    # Outputs that are yet to be kept there have room that the spec promises them.
    room = room_on_gpu(passes.spec, device) - max(0, passes.memory(1).kept - kept_bytes)
    guess = largest(sizes, lambda size: passes.memory(size).total <= room)
    with as_in_training(model), limited(device, room):
        size = largest_that_runs(sizes, run, guess, tidy)
    torch.cuda.reset_peak_memory_stats(device)
    return passes.choice(size, PROBE, max(before, peaks.get(size, 0)))


def one_pass(
    passes: Passes, windows: int, model: Any, parameters: Sequence[nn.Parameter], runtime: Runtime, frames: int
) -> None:
    """Forward and backward of so many windows, beside gradients and what AdamW holds.

    Raises:
        torch.OutOfMemoryError: it has no room.
    """
    moments = [torch.zeros_like(parameter) for parameter in parameters for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    features_BMF = torch.zeros(windows, passes.dims.num_mel_bins, frames, device=runtime.device)
    tokens_BT = torch.zeros(windows, passes.tokens, dtype=torch.int64)
    batch = Batch(features_BMF, tokens_BT, tokens_BT, rows=[])
    with runtime.autocast():
        loss = forward_loss(
            model,
            batch,
            runtime.device,
            freeze_encoder=passes.spec.training.freeze_encoder,
            fast_loss=passes.spec.engine.fast_loss,
        )
    runtime.backward(loss / tokens_BT.numel())
    del moments


def forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Leave them as before the first step."""
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def as_in_training(model: Any) -> Iterator[None]:
    """Have a model train, with random numbers of which none is missing afterwards."""
    states, trained = random_states(), model.training
    model.train()
    try:
        yield
    finally:
        model.train(trained)
        restore_random_states(states)
