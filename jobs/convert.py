"""The adapter that a run publishes: one that reproduces the trained model on the untouched base, loaded plainly."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from jobs.adapter import ADAPTER_NAME, LowRank
from jobs.train.checkpoint import write_adapter
from service.spec.training import CHANGES_BASE, init_family


def save_published(folder: Path, model: Any, state: dict[str, Tensor], start: dict[str, LowRank]) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: where to.
        model: the trained PeftModel, for its configuration.
        state: the adapter to publish, as `adapter_state` gives it.
        start: how the run's adapter began, as `snapshot` gives it.
    """
    config = copy.deepcopy(model.peft_config[ADAPTER_NAME])
    if init_family(config.init_lora_weights) in CHANGES_BASE:
        state, config = over_untouched_base(state, start), with_doubled_ranks(config)
    # Whoever loads it is to take the weights as they are, and to leave the base alone.
    config.init_lora_weights = True
    write_adapter(folder, config, state)


def over_untouched_base(state: dict[str, Tensor], start: dict[str, LowRank]) -> dict[str, Tensor]:
    """Turn an adapter over W - s * B0 @ A0 into one over W: s * [B, -B0] @ [A; A0] = s * (B @ A - B0 @ A0).

    Magnitudes of DoRA scale the same sum of base and update, and stay as they are; so do modules trained in full.

    Args:
        state: A (r, in), B (out, r) and others, under the names of PEFT's files.
        start: A0 and B0 by layer.

    Returns:
        the same with A (2 r, in) and B (out, 2 r).
    """
    changed = dict(state)
    for name, begun in start.items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        changed[a] = torch.cat([state[a], begun.a_RI])
        changed[b] = torch.cat([state[b], -begun.b_OR], dim=1).contiguous()
    return changed


def with_doubled_ranks(config: LoraConfig) -> LoraConfig:
    """Double every rank and every alpha: each scaling alpha / r stays as it was."""
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: 2 * alpha for name, alpha in config.alpha_pattern.items()}
    return config
