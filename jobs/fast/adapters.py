"""How the adapted layers of a model compute, as `engine` says."""

from __future__ import annotations

from typing import Any

from jobs.fast import dora, lora
from service.spec.sections import EngineConfig


def speed_up(model: Any, engine: EngineConfig) -> dora.FastDora:
    """Set how LoRA and DoRA layers compute; of a model without adapters nothing changes.

    Returns:
        what is to hear of each optimizer step (`refresh`).
    """
    lora.speed_up(model, fast=engine.fast_lora)
    return dora.speed_up(model, engine.dora_dropout, fast=engine.fast_dora)
