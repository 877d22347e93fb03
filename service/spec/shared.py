"""Whether the trials of a search can train together over one base model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.spec.job import JobSpec
from service.spec.space import planned_trials, space_of
from service.spec.training import PLAIN_INITS

TRIALS = 8
"""How many trials train together in a process where the spec does not say."""


def why_separate(spec: JobSpec) -> list[str]:
    """What keeps the trials of a search from sharing a base model; empty where nothing does."""
    return list(_reasons(spec))


def is_shared(spec: JobSpec) -> bool:
    """Whether a search's trials train together."""
    return spec.search.engine != "separate" and not why_separate(spec)


def trials_together(spec: JobSpec) -> int:
    """How many trials of a search train together in a process, at most."""
    return min(spec.search.concurrent or TRIALS, planned_trials(spec))


def _reasons(spec: JobSpec) -> Iterator[str]:
    if not all(_values(spec, "freeze_encoder")):
        yield "training.freeze_encoder is false: each trial trains the encoder in a way of its own"
    if mutating := [init for init in _values(spec, "lora_init") if init not in PLAIN_INITS]:
        yield f"training.lora_init {mutating[0]} changes the base model, or looks at data"
    if any(_values(spec, "modules_to_save")):
        yield "training.modules_to_save trains parts of the base model itself"
    if spec.resources.workers > 1:
        yield f"resources.workers is {spec.resources.workers}: a trial spreads over several processes"
    if spec.training.fp16:
        yield "training.fp16 scales each trial's loss in a way of its own"
    drops = any(_values(spec, "use_dora")) and any(_values(spec, "lora_dropout"))
    if drops and spec.engine.dora_dropout == "peft":
        yield "engine.dora_dropout is peft: another function for each trial's dropout"
    if not spec.engine.fast_loss:
        yield "engine.fast_loss is false: trials that train together have no other loss"
    if spec.engine.gradient_checkpointing:
        yield "engine.gradient_checkpointing recomputes what the trials share"


def _values(spec: JobSpec, name: str) -> list[Any]:
    """What a setting may be in a search: the spec's own value, and those of the space."""
    dimension = space_of(spec).get(name)
    return [getattr(spec.training, name), *(dimension.options if dimension else [])]
