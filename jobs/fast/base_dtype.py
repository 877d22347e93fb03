"""A frozen base whose matrices lie in memory as mixed precision multiplies them.

Autocast casts each frozen weight anew in every forward pass, since it remembers only casts of weights that are trained.
Here they are cast once. What is multiplied is the same to the bit, and the matrices take half the memory.

What is not only multiplied stays in float32: embeddings and the output head that is one matrix with them, layer norms,
the weights under DoRA, whose row norms are made of them, and all that is trained.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from jobs.adapter import ADAPTER_NAME, lora_layers, saved_in_full
from service.spec.job import JobSpec
from service.spec.training import PLAIN_INITS

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cast_base(model: Any, spec: JobSpec, precision: str) -> int:
    """Cast what `engine.base_dtype` says of a PeftModel whose adapters are in place.

    Args:
        model: the PeftModel.
        spec: the job.
        precision: `no`, `fp16` or `bf16`: every later forward pass is under its autocast.

    Returns:
        how many modules were cast.
    """
    # Other initialisations have changed the base's weights, and what is published is converted from those.
    if spec.engine.base_dtype == "float32" or precision not in DTYPES or spec.training.lora_init not in PLAIN_INITS:
        return 0
    found = matrices(model)
    for module in found:
        module.to(DTYPES[precision])
    return len(found)


def matrices(model: Any) -> list[nn.Module]:
    """The frozen linear layers and convolutions that may be cast."""
    kept = {id(part) for _, wrapper in saved_in_full(model) for part in wrapper.modules()}
    for _, layer in lora_layers(model):
        if ADAPTER_NAME in getattr(layer, "lora_variant", {}):
            kept.add(id(layer.get_base_layer()))
    users = Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))
    return [
        module
        for module in model.modules()
        if type(module) in (nn.Linear, nn.Conv1d)
        and id(module) not in kept
        and all(not each.requires_grad and users[id(each)] == 1 for each in module.parameters(recurse=False))
    ]
