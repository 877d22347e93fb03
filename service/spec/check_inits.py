"""Checks of `lora_init`: what an initialisation excludes, and the ranks that it can give."""

from __future__ import annotations

from collections.abc import Sequence

from service.spec.findings import Finding, Findings, advice
from service.spec.job import JobSpec
from service.spec.targets import AdaptedModule, pattern_key
from service.spec.training import CHANGES_BASE, READS_DATA, TrainingConfig, init_family

INIT = "training.lora_init"

DIRECTIONS = {"pissa": 1, "olora": 1, "corda": 1, "mica": 1, "lora_ga": 2, "eva": 4}
"""How many singular vectors of a module's weight, gradient or inputs PEFT computes for an adapter, in ranks."""


def init_findings(spec: JobSpec) -> Findings:
    """What the initialisation excludes; no model is needed to see it."""
    training = spec.training
    init = training.lora_init
    family = init_family(init)
    if init == "mica" and training.use_dora:
        yield Finding((INIT, "training.use_dora"), "excludes use_dora: PEFT has no DoRA with a fixed B", init)
    if init == "eva" and training.lora_rank_pattern:
        message = "gives each module a rank of its own and would overwrite lora_rank_pattern; leave one of the two out"
        yield Finding((INIT, "training.lora_rank_pattern"), message, init)
    if family in READS_DATA and spec.engine.attention == "flash_attention_2":
        message = "looks at the clips in float32, which flash_attention_2 does not compute in; take sdpa"
        yield Finding(("engine.attention", INIT), message, spec.engine.attention)
    if family not in READS_DATA and spec.engine.init_clips != type(spec.engine).model_fields["init_clips"].default:
        message = f"has no effect: of lora_init only {', '.join(READS_DATA)} look at clips"
        yield advice("engine.init_clips", message, spec.engine.init_clips)
    if family in CHANGES_BASE and training.lora_dropout > 0:
        message = f"drops parts of the base's own weights, which lora_init {init} puts into A and B; 0 is usual with it"
        yield advice("training.lora_dropout", message, training.lora_dropout)


def init_rank_findings(training: TrainingConfig, adapted: Sequence[AdaptedModule]) -> Findings:
    """Whether every adapted module has as many directions as its adapter wants: a weight has min(in, out) of them, and
    inputs have in."""
    family = init_family(training.lora_init)
    if family not in DIRECTIONS:
        return
    wanted = DIRECTIONS[str(family)]
    for module in adapted:
        held = module.in_features if family == "eva" else min(module.in_features, module.out_features)
        if wanted * module.rank > held:
            key = pattern_key(training.lora_rank_pattern, module.name)
            yield Finding(
                ("training.lora_r" if key is None else "training.lora_rank_pattern", INIT),
                f"is too high for lora_init {training.lora_init}: {module.name} allows {held // wanted} at most",
                module.rank if key is None else {key: module.rank},
            )
            return
