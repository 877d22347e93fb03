"""Which adapted layers, and which calls of them, the fast ways compute; all else stays PEFT's."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from jobs.adapter import ADAPTER_NAME


def is_plain(layer: Any) -> bool:
    """Whether a layer is PEFT's linear one over torch's, with nothing but A, B and, as a DoRA, a magnitude."""
    return (
        type(layer) is Linear
        and isinstance(layer.lora_variant.get(ADAPTER_NAME), DoraLinearVariant | None)
        and type(layer.get_base_layer()) is nn.Linear
        and layer.lora_B[ADAPTER_NAME].bias is None
        and not layer.fan_in_fan_out
    )


def is_dora(layer: Any) -> bool:
    """Of a plain layer: whether it has a magnitude."""
    return ADAPTER_NAME in layer.lora_variant


def is_in_use(layer: Any) -> bool:
    """Whether its adapter, and no other, is what it computes with now."""
    return not (layer.disable_adapters or layer.merged) and layer.active_adapters == [ADAPTER_NAME]


def trains_base(layer: Any) -> bool:
    """Whether W or b want gradients."""
    return any(parameter.requires_grad for parameter in layer.get_base_layer().parameters())
