"""Which modules a training config adapts, with what rank and alpha, by the rules of PEFT 0.21.

Sources: peft.tuners.tuners_utils.check_target_module_exists, peft.utils.other.get_pattern_key, _set_trainable.
Pure functions over names; held to PEFT itself by tests/unit/test_plan_peft.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from service.spec.training import CHANGES_BASE, TrainingConfig, init_family
from service.spec.whisper_modules import Module

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer except the output head."""

ENCODER = "model.encoder"
FROZEN_ENCODER = r"model\.encoder(\..*)?"
"""What `freeze_encoder` leaves out, for PEFT's `exclude_modules`."""

ADAPTABLE = ("linear", "conv1d")
PARTS = (
    "encoder convolutions",
    "encoder self-attention",
    "encoder MLP",
    "decoder self-attention",
    "cross-attention",
    "decoder MLP",
)
_LAYER_LINEARS = ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class AdaptedModule:
    """One module with an adapter of its own.

    Attributes:
        alpha: a whole number, until an initialisation moves ranks and the scaling is to stay.
        parameters: trainable ones: A, B and, with DoRA, the magnitudes.
        published: those of the saved adapter.
    """

    name: str
    rank: int
    alpha: float
    part: str
    in_features: int
    out_features: int
    parameters: int
    published: int

    @property
    def scaling(self) -> float:
        """Factor of B @ A."""
        return self.alpha / self.rank


def resolve_targets(training: TrainingConfig, module_names: Iterable[str]) -> list[str]:
    """The names among `module_names` that get an adapter, in their order."""
    return [name for name in module_names if is_targeted(training, name)]


def is_targeted(training: TrainingConfig, name: str) -> bool:
    """Whether the settings put an adapter on the module of that name."""
    if training.freeze_encoder and in_encoder(name):
        return False
    if is_saved(training.modules_to_save, name):
        return False
    return matches_targets(training.lora_target_modules, name)


def matches_targets(targets: list[str] | str, name: str) -> bool:
    """Whether a module's name matches: a list by whole name or ending, a regular expression by the whole name."""
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return name.rsplit(".", 1)[-1] in _LAYER_LINEARS
        return re.fullmatch(targets, name) is not None
    return any(name_ends(name, target) for target in targets)


def name_ends(name: str, ending: str) -> bool:
    """Whether `ending` is the whole name or its last parts."""
    return name == ending or name.endswith(f".{ending}")


def in_encoder(name: str) -> bool:
    """Whether a module belongs to the encoder."""
    return name == ENCODER or name.startswith(f"{ENCODER}.")


def is_saved(modules_to_save: Sequence[str] | None, name: str) -> bool:
    """Whether a module is, or lies in, one that is trained in full: PEFT puts no adapter there."""
    return any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in modules_to_save or ())


def saved_modules(modules_to_save: Sequence[str] | None, names: Iterable[str]) -> list[str]:
    """The modules that PEFT trains in full. It compares bare endings: `layer_norm` hits `final_layer_norm` too."""
    endings = tuple(modules_to_save or ())
    return [name for name in names if endings and name.endswith(endings)]


def pattern_key(patterns: Mapping[str, int] | None, name: str) -> str | None:
    """The first key, in the order of the file, that matches the end of a module's name from a dot on."""
    for key in patterns or ():
        if re.match(pattern_regex(key), name):
            return key
    return None


def pattern_regex(key: str) -> str:
    """The regular expression that PEFT makes of a key of a rank or alpha pattern."""
    return rf"(.*\.)?({key})$"


def rank_and_alpha(training: TrainingConfig, name: str) -> tuple[int, int]:
    """Rank and alpha of the adapter on the module of that name."""
    rank_key = pattern_key(training.lora_rank_pattern, name)
    alpha_key = pattern_key(training.lora_alpha_pattern, name)
    rank = (training.lora_rank_pattern or {})[rank_key] if rank_key is not None else training.lora_r
    alpha = (training.lora_alpha_pattern or {})[alpha_key] if alpha_key is not None else training.lora_alpha
    return rank, alpha


def adapted_modules(training: TrainingConfig, modules: Sequence[Module]) -> list[AdaptedModule]:
    """Every module that gets an adapter, with its rank, alpha, part of the model and count of trainable parameters.

    LoRA has r * (in * kernel + out) parameters on a module, DoRA out more: one magnitude per output row. MiCA trains
    A alone. An adapter whose initialisation changes the base is published with twice the rank.
    """
    factor = 2 if init_family(training.lora_init) in CHANGES_BASE else 1
    adapted = []
    for module in modules:
        if module.kind not in ADAPTABLE or not is_targeted(training, module.name):
            continue
        rank, alpha = rank_and_alpha(training, module.name)
        fan_in, fan_out = module.in_features * module.kernel, module.out_features
        magnitudes = fan_out if training.use_dora else 0
        trained = rank * fan_in if training.lora_init == "mica" else rank * (fan_in + fan_out)
        adapted.append(
            AdaptedModule(
                name=module.name,
                rank=rank,
                alpha=alpha,
                part=part_of(module.name),
                in_features=module.in_features,
                out_features=fan_out,
                parameters=trained + magnitudes,
                published=factor * rank * (fan_in + fan_out) + magnitudes,
            )
        )
    return adapted


def part_of(name: str) -> str:
    """The part of the model (one of PARTS) that an adaptable module of a layer belongs to."""
    encoder = in_encoder(name)
    if ".encoder_attn." in name:
        return "cross-attention"
    if ".self_attn." in name:
        return "encoder self-attention" if encoder else "decoder self-attention"
    if re.search(r"\.conv\d$", name):
        return "encoder convolutions"
    return "encoder MLP" if encoder else "decoder MLP"
