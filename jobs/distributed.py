"""What workers exchange: sums of numbers, gradients, and lists. All of it is a no-op for a single process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def together() -> bool:
    """Whether there are other workers."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for all workers."""
    if together():
        dist.barrier()


def sum_numbers(values: Sequence[float], device: torch.device) -> list[float]:
    """The sums of numbers over all workers, in float64."""
    if not together():
        return [float(value) for value in values]
    totals = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    return [float(total) for total in totals]


def gather(items: list[Any]) -> list[Any]:
    """The lists of all workers, joined in the order of their ranks."""
    if not together():
        return items
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all workers.

    One flat buffer, one collective: adapters are small, so there is nothing to overlap. Its order of additions never
    changes, also not on a resumed run, whereas DistributedDataParallel rebuilds its buckets after the first step.
    """
    if not together():
        return
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([piece.flatten() for piece in pieces])
    dist.all_reduce(flat)
    for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
