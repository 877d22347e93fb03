"""How an adapter begins: its initial state is made once per run, by rank 0, kept, and loaded by every worker.

So no singular value decomposition and no look at the data is repeated: a resumed run, or one with another number of
workers, begins from the same bits. The state is a PEFT folder, checkpoints/initial: the factors A0 and B0, magnitudes,
modules that are trained in full, and in its configuration the ranks, which `eva` moves.

Some initialisations change the base, to W - s * B0 @ A0. It is computed here, from the kept factors, in every worker.
Checkpoints hold the adapter over the changed base; jobs/convert.py makes one for the untouched base of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.config import LoraGAConfig
from safetensors.torch import load_file

from jobs import distributed
from jobs.adapter import ADAPTER_NAME, attach, base_name, lora_config, lora_layers, plan_of
from jobs.init_data import InitClips, eva_directions, prepare_corda, prepare_lora_ga
from jobs.train.checkpoint import WEIGHTS, adapter_state, save_adapter
from jobs.train.store import fault_in, keep_sealed
from service.artifacts import CHECKPOINTS
from service.errors import InputError
from service.spec.targets import AdaptedModule, matches_targets
from service.spec.training import CHANGES_BASE, TrainingConfig, init_family
from service.storage import Storage, sha256_of

INITIAL = f"{CHECKPOINTS}/initial"

START: dict[str, Callable[[Any, str], None]] = {
    "pissa": lambda layer, init: layer.pissa_init(ADAPTER_NAME, init),
    "olora": lambda layer, init: layer.olora_init(ADAPTER_NAME),
    "corda": lambda layer, init: layer.corda_init(ADAPTER_NAME, init),
    "lora_ga": lambda layer, init: layer.lora_ga_init(ADAPTER_NAME, LoraGAConfig()),
    "mica": lambda layer, init: layer.mica_init(ADAPTER_NAME),
}
"""What PEFT does with one layer, by family."""

PREPARE: dict[str, Callable[[Any, LoraConfig, InitClips], None]] = {
    "corda": prepare_corda,
    "lora_ga": prepare_lora_ga,
}
"""What it wants on the base model's layers first."""


def begin(model: Any, training: TrainingConfig, storage: Storage, rank: int, clips: Callable[[], InitClips]) -> Any:
    """Attach adapters in the run's initial state, which rank 0 makes where there is none yet. All workers call it.

    Args:
        model: the untouched base, on the worker's device; four of the initialisations change its weights.
        training: the settings.
        storage: the run's root.
        rank: this worker's.
        clips: gives the clips for the initialisations that look at data.

    Returns:
        the PeftModel.

    Raises:
        SpecError: what `attach` refuses, or too few clips for `eva`.
        JobFailedError: `eva` does not settle.
        InputError: what is kept is no initial state of this run.
    """
    wrapped = None
    # One worker looks: on a network file system the others' look would hide the file from them for a while.
    if not distributed.gather([rank == 0 and fault_in(storage, INITIAL) is None])[0]:
        if rank == 0:
            made = wrapped = make(model, training, clips)
            keep_sealed(storage, INITIAL, lambda folder: save_adapter(folder, made, adapter_state(made)))
        distributed.barrier()
    folder = storage.fetch(INITIAL)
    if wrapped is None:
        kept = LoraConfig.from_pretrained(str(folder))
        wrapped, _ = attach(model, training, _as_kept(plan_of(model, training), kept))
    _load(wrapped, folder)
    wrapped.peft_config[ADAPTER_NAME].init_lora_weights = training.lora_init
    for _, layer in lora_layers(wrapped):
        if training.lora_init == "mica":
            layer.lora_B[ADAPTER_NAME].requires_grad_(False)
        if init_family(training.lora_init) in CHANGES_BASE:
            subtract_start(layer)
    return wrapped


def initial_sha256(storage: Storage) -> str:
    """SHA-256 of the run's initial state: what its checkpoints are to be read over."""
    return sha256_of(storage.fetch(INITIAL) / WEIGHTS)


def make(model: Any, training: TrainingConfig, clips: Callable[[], InitClips]) -> Any:
    """Attach adapters as `lora_init` wants them to begin. The base is left untouched.

    Returns:
        the PeftModel; where the initialisation changes the base, s * B0 @ A0 is still to be taken out of it.
    """
    plan, init = plan_of(model, training), training.lora_init
    if init == "eva":
        return _make_eva(model, training, plan, clips())
    family = init_family(init)
    if prepare := PREPARE.get(str(family)):
        prepare(model, lora_config(training, plan), clips())
    wrapped, _ = attach(model, training, plan)
    if start := START.get(str(family)):
        for _, layer in lora_layers(wrapped):
            weight = layer.get_base_layer().weight
            # PEFT changes it, some of its initialisations in place; one layer's copy at a time is all that it takes.
            untouched = weight.data.clone()
            with torch.no_grad():
                start(layer, str(init))
            weight.data = untouched
    return wrapped


def _make_eva(model: Any, training: TrainingConfig, plan: list[AdaptedModule], clips: InitClips) -> Any:
    directions = eva_directions(model, lora_config(training, plan), clips)
    wrapped, _ = attach(model, training, with_ranks(plan, {name: len(a) for name, a in directions.items()}))
    for name, layer in lora_layers(wrapped):
        layer.lora_A[ADAPTER_NAME].weight.data.copy_(directions[base_name(name)])
    return wrapped


def subtract_start(layer: Any) -> None:
    """Take s * B @ A out of a layer's base weight, in its precision (float32 here), so that both together are the base
    layer."""
    base = layer.get_base_layer().weight
    a_RI, b_OR = layer.lora_A[ADAPTER_NAME].weight.data, layer.lora_B[ADAPTER_NAME].weight.data
    with torch.autocast(base.device.type, enabled=False):
        base.data = base.data - layer.scaling[ADAPTER_NAME] * (b_OR @ a_RI)


def with_ranks(plan: list[AdaptedModule], ranks: dict[str, int]) -> list[AdaptedModule]:
    """The plan with other ranks, at the same scaling; a module of rank 0 has no adapter. Counts stay the plan's."""
    return [
        replace(module, rank=ranks[module.name], alpha=_scaled(module, ranks[module.name]))
        for module in plan
        if ranks[module.name]
    ]


def _scaled(module: AdaptedModule, rank: int) -> float:
    return module.alpha if rank == module.rank else module.alpha * (rank / module.rank)


def without_adapter(model: Any, training: TrainingConfig) -> list[str]:
    """Modules of the plan that the initialisation has left without an adapter."""
    adapted = {base_name(name) for name, _ in lora_layers(model)}
    return [module.name for module in plan_of(model.get_base_model(), training) if module.name not in adapted]


def _as_kept(plan: list[AdaptedModule], kept: LoraConfig) -> list[AdaptedModule]:
    """The plan with the modules, ranks and alphas of a kept configuration, whose patterns hold whole names."""
    targets = kept.target_modules if isinstance(kept.target_modules, str) else sorted(kept.target_modules or ())
    return [
        replace(
            module,
            rank=kept.rank_pattern.get(module.name, kept.r),
            alpha=kept.alpha_pattern.get(module.name, kept.lora_alpha),
        )
        for module in plan
        if matches_targets(targets, module.name)
    ]


def _load(wrapped: Any, folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    if {name: each.shape for name, each in state.items()} != {name: each.shape for name, each in expected.items()}:
        raise InputError(f"{folder}: is not how this run's adapter began; begin anew with --overwrite")
    set_peft_model_state_dict(wrapped, state)
