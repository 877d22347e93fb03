"""Which device a process computes on, in what precision: one answer for training, scoring and merging."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from service.errors import Fault, SpecError
from service.spec.job import JobSpec


def has_gpu(spec: JobSpec) -> bool:
    """Whether this process may use a GPU.

    Ray leaves the GPUs visible to a worker that asked for none, so being able to see one is not enough.
    """
    asked = spec.resources.gpus_per_worker
    return (asked is None or asked > 0) and torch.cuda.is_available()


def device_of(spec: JobSpec) -> torch.device:
    """The GPU that this process may use, or the CPU."""
    return torch.device("cuda" if has_gpu(spec) else "cpu")


def set_threads(spec: JobSpec) -> None:
    """Give torch the CPU threads that the spec says: `engine.threads`, else the worker's CPUs."""
    torch.set_num_threads(spec.engine.threads or max(1, round(spec.resources.cpus_per_worker)))


def precision_of(spec: JobSpec) -> str:
    """`no`, `fp16` or `bf16`: what the settings ask for and the hardware has.

    Raises:
        SpecError: it lacks what they ask for.
    """
    training, gpu = spec.training, has_gpu(spec)
    has_bf16 = not gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if training.fp16 and not gpu:
        raise SpecError([Fault("training.fp16", "needs a GPU, and this worker has none; leave it out", True)])
    if training.bf16 and not has_bf16:
        raise SpecError([Fault("training.bf16", "is not supported by this GPU; use fp16", True)])
    precision = "no"
    if training.fp16:
        precision = "fp16"
    elif training.bf16 or (training.bf16 is None and gpu and has_bf16):
        precision = "bf16"
    if spec.engine.attention == "flash_attention_2" and precision == "no":
        way_out = "works in half precision on a GPU only; take sdpa, or set training.bf16 or training.fp16"
        raise SpecError([Fault("engine.attention", way_out, spec.engine.attention)])
    return precision


def autocast(spec: JobSpec) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision as in training."""
    kind = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision_of(spec)]
    return torch.autocast(device_of(spec).type, dtype=kind, enabled=kind is not None)
