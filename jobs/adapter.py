"""LoRA and DoRA adapters by PEFT: attaching them, and the proof that every one of them has learned.

Initialisations that PEFT's LoraConfig cannot give alone (they change the base, or look at data) are in jobs/inits.py.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraRuntimeConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from service.errors import Fault, SpecError, VerificationError
from service.spec.targets import AdaptedModule, adapted_modules, in_encoder, part_of, saved_modules
from service.spec.training import PLAIN_INITS, TrainingConfig
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import EMBEDDING, modules

ADAPTER_NAME = "default"
CONVOLUTIONS = "encoder convolutions"
SAVED = "saved in full"
"""The part, beside those of service.spec.targets, that counts `modules_to_save`."""


def plan_adapter(training: TrainingConfig, dims: WhisperDims) -> list[AdaptedModule]:
    """Which modules get an adapter, with rank and alpha: the same answer that `validate` and the dry run give."""
    return adapted_modules(training, modules(dims))


def plan_of(model: Any, training: TrainingConfig) -> list[AdaptedModule]:
    """The plan for a base model in memory."""
    return plan_adapter(training, WhisperDims.from_config(model.config.to_dict()))


def lora_config(training: TrainingConfig, adapted: list[AdaptedModule], *, on_gpu: bool = False) -> LoraConfig:
    """PEFT's configuration for these modules, of a model that is or is not on a GPU.

    Names, ranks and alphas are written out in full. PEFT would match patterns itself, but accepts a key that matches
    nothing, and the saved adapter_config.json then says exactly what was trained.
    """
    offload = training.ephemeral_gpu_offload and on_gpu
    return LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=[module.name for module in adapted],
        modules_to_save=training.modules_to_save,
        # whisper.cpp and openai-whisper have one matrix for embedding and output head.
        ensure_weight_tying=bool(saved_modules(training.modules_to_save, [EMBEDDING])),
        use_dora=training.use_dora,
        init_lora_weights=training.lora_init if training.lora_init in PLAIN_INITS else True,
        rank_pattern={m.name: m.rank for m in adapted if m.rank != training.lora_r},
        alpha_pattern={m.name: m.alpha for m in adapted if m.alpha != training.lora_alpha},
        # Without a GPU PEFT dies on an assertion here; there it would have no effect anyway.
        runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=offload),
    )


def attach(
    model: Any, training: TrainingConfig, adapted: list[AdaptedModule] | None = None
) -> tuple[Any, list[AdaptedModule]]:
    """Wrap a Whisper model with fresh adapters; everything else is frozen.

    Other initialisations than PLAIN_INITS begin as `true` here; jobs.inits goes on from there.

    Args:
        model: the base.
        training: the settings.
        adapted: modules, ranks and alphas; without it those of the plan.

    Returns:
        the PeftModel, and what was adapted.

    Raises:
        SpecError: PEFT adapted other modules than the plan says, or the model cannot run with what was planned.
    """
    if adapted is None:
        adapted = plan_of(model, training)
    if convolutions := [module.name for module in adapted if module.part == CONVOLUTIONS]:
        # transformers' encoder asks the convolution for its stride, which PEFT's layer does not pass on.
        why = f"puts an adapter on {convolutions[0]}, and transformers' Whisper cannot run so; leave convolutions out"
        raise SpecError([Fault("training.lora_target_modules", why)])
    on_gpu = next(model.parameters()).device.type == "cuda"
    wrapped = get_peft_model(model, lora_config(training, adapted, on_gpu=on_gpu))
    found = {base_name(name) for name, _ in lora_layers(wrapped)}
    expected = {module.name for module in adapted}
    if found != expected:
        differing = ", ".join(sorted(found ^ expected)[:5])
        raise SpecError([Fault("training.lora_target_modules", f"PEFT and the plan disagree on {differing}")])
    if training.freeze_encoder:
        for name, wrapper in saved_in_full(wrapped):
            if in_encoder(base_name(name)):
                wrapper.requires_grad_(False)
    return wrapped, adapted


def require_mergeable(model: Any) -> None:
    """Refuse adapters whose merge PEFT itself gets wrong.

    Raises:
        SpecError: an adapter changes the token embedding without the output head that is one matrix with it.
    """
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper) or (
            isinstance(module, BaseTunerLayer) and base_name(name).endswith(EMBEDDING.rsplit(".", 1)[-1])
        ):
            why = f"adapts {base_name(name)}, which is one matrix with the output head: merging changes the head too"
            raise SpecError([Fault("adapter", f"{why}; train with modules_to_save in its place")])


def load_adapter(model: Any, folder: Path) -> Any:
    """Put a saved adapter on its untouched base, for inference.

    Raises:
        SpecError: the folder holds no PEFT adapter, an incomplete one, or one for another model.
    """
    try:
        with warnings.catch_warnings():
            # PEFT would leave what the file lacks as it was initialised.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            config = PeftConfig.from_pretrained(str(folder))
            config.task_type = None  # SEQ_2_SEQ_LM would have PEFT pass on `input_ids`, which Whisper has not
            config.inference_mode = True
            # Else PEFT takes the adapter to a GPU wherever one is in sight, whoever's it is.
            device = str(next(model.parameters()).device)
            return PeftModel.from_pretrained(model, str(folder), config=config, torch_device=device).eval()
    except (ValueError, RuntimeError, OSError, SafetensorError, UserWarning) as error:
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise SpecError([Fault(str(folder), f"is no adapter for this base model ({reason})")]) from error


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """The adapted layers of a PeftModel as (full name, layer)."""
    return [(name, module) for name, module in model.named_modules() if ADAPTER_NAME in getattr(module, "lora_A", {})]


def saved_in_full(model: Any) -> list[tuple[str, Any]]:
    """The modules that are trained in full as (full name, wrapper); the output head is not named beside the embedding
    whose matrix it shares."""
    found: list[tuple[str, Any]] = []
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = set(module.modules_to_save[ADAPTER_NAME].parameters())
            if not own <= seen:
                found.append((name, module))
            seen |= own
    return found


def base_name(name: str) -> str:
    """A module's name in the base model, from its name in the PeftModel around it."""
    return name.removeprefix("base_model.model.")


def trainable_parameters(model: Any) -> list[tuple[str, nn.Parameter]]:
    """What the optimizer updates, in a fixed order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class LowRank:
    """Copies of one layer's factors: A (r, in), B (out, r), and the scale before B @ A."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


def snapshot(model: Any) -> dict[str, LowRank]:
    """Copies of all factors, to compare with later."""
    return {name: _factors(layer) for name, layer in lora_layers(model)}


def _factors(layer: Any) -> LowRank:
    a = layer.lora_A[ADAPTER_NAME].weight.detach().float().cpu().clone().flatten(1)
    b = layer.lora_B[ADAPTER_NAME].weight.detach().float().cpu().clone().flatten(1)
    return LowRank(a, b, float(layer.scaling[ADAPTER_NAME]))


def coverage(model: Any, before: dict[str, LowRank]) -> dict[str, Any]:
    """Which modules were adapted, part by part, and how many did not move.

    A module has moved when s * B @ A differs from where it began: with orthogonal, B is not zero to begin with. One
    that is trained in full has moved when a weight of it differs from the base's.

    Args:
        model: the trained PeftModel.
        before: its `snapshot` before the first step.

    Returns:
        {"modules", "saved", "ranks": [smallest, largest], "zero_updates", "unchanged": [names], "coverage": {part:
        {"adapted", "changed"}}}; `modules` have an adapter, `saved` are trained in full, and each is in one part.
    """
    parts: dict[str, dict[str, int]] = {}
    unchanged = []

    def count(part: str, name: str, moved: bool) -> None:
        numbers = parts.setdefault(part, {"adapted": 0, "changed": 0})
        numbers["adapted"] += 1
        numbers["changed"] += moved
        if not moved:
            unchanged.append(name)

    layers = lora_layers(model)
    for name, layer in layers:
        now, then = _factors(layer), before[name]
        moved = not torch.equal(now.scale * (now.b_OR @ now.a_RI), then.scale * (then.b_OR @ then.a_RI))
        count(part_of(base_name(name)), base_name(name), moved)
    saved = [
        (name, wrapper)
        for name, wrapper in saved_in_full(model)
        if any(parameter.requires_grad for parameter in wrapper.parameters())
    ]
    for name, wrapper in saved:
        trained, base = wrapper.modules_to_save[ADAPTER_NAME].parameters(), wrapper.original_module.parameters()
        moved = any(not torch.equal(one, other) for one, other in zip(trained, base, strict=True))
        count(SAVED, base_name(name), moved)
    ranks = [layer.r[ADAPTER_NAME] for _, layer in layers]
    return {
        "modules": len(layers),
        "saved": len(saved),
        "ranks": [min(ranks), max(ranks)],
        "zero_updates": len(unchanged),
        "unchanged": unchanged,
        "coverage": parts,
    }


def require_coverage(result: dict[str, Any]) -> None:
    """Refuse a run in which an adapter has not learned.

    Raises:
        VerificationError: a module's update is what it was before the training.
    """
    if result["zero_updates"]:
        shown = ", ".join(result["unchanged"][:5])
        raise VerificationError(
            f"{result['zero_updates']} of {result['modules'] + result['saved']} adapted modules did not change in "
            f"training: {shown}. Raise training.lr, train longer, or take them out of training.lora_target_modules or "
            "training.modules_to_save"
        )
