"""Checks of targets, patterns and saved modules against the model's own modules, before any GPU is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from service.spec.check_inits import init_rank_findings
from service.spec.findings import Finding, Findings, advice
from service.spec.settings import nearest
from service.spec.targets import (
    ADAPTABLE,
    ALL_LINEAR,
    adapted_modules,
    in_encoder,
    is_saved,
    matches_targets,
    name_ends,
    pattern_key,
    saved_modules,
)
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import EMBEDDING, HEAD, Module

TARGETS = "training.lora_target_modules"
SAVED = "training.modules_to_save"
FROZEN = "training.freeze_encoder"
BASE = "training.base_model"

_EXAMPLE = "model.decoder.layers.0.self_attn.q_proj"
_NOT_ADAPTABLE = {
    "layer_norm": "a layer norm, which takes no adapter; take it out, or train it in full through modules_to_save",
    "activation": "an activation without weights; take it out",
    "embedding": "an embedding, which takes no adapter; take it out, or train it in full through modules_to_save",
    "container": "a block of several modules; name the linear layers in it, such as {example}",
    "list": "a block of several modules; name the linear layers in it, such as {example}",
}


def module_findings(training: TrainingConfig, modules: Sequence[Module], dims: WhisperDims) -> Findings:
    """All checks of this file.

    Args:
        modules: the model's, as `whisper_modules.modules` gives them.
    """
    names = [module.name for module in modules]
    of_targets = list(_targets(training, modules, dims))
    of_saved = list(_saved(training, modules, names))
    yield from of_targets
    yield from of_saved
    adapted = [] if of_targets else adapted_modules(training, modules)
    reachable = [module.name for module in adapted] or names
    for setting in ("lora_rank_pattern", "lora_alpha_pattern"):
        yield from _pattern(training, setting, names, reachable, dims)
    if of_targets:
        yield from rank_findings(training)
    else:
        yield from rank_findings(training, [module.name for module in adapted])
        yield from _conv_init(training, modules)
        yield from init_rank_findings(training, adapted)
        for rank, limit in sorted({(m.rank, min(m.in_features, m.out_features)) for m in adapted}):
            if rank > limit:
                message = f"exceeds {limit}, the rank of the weights themselves; a smaller one says as much"
                yield advice("training.lora_r", message, rank)
                break


def rank_findings(training: TrainingConfig, adapted: Iterable[str] | None = None) -> Findings:
    """Orthogonal initialisation wants even ranks, wherever they come from.

    Args:
        adapted: names of the adapted modules; None where the model is not known.
    """
    if training.lora_init != "orthogonal":
        return
    own = adapted is None or any(pattern_key(training.lora_rank_pattern, name) is None for name in adapted)
    if own and training.lora_r % 2:
        yield Finding(
            ("training.lora_r", "training.lora_init"),
            f"is odd, and lora_init orthogonal wants even ranks; give {training.lora_r + 1}",
            training.lora_r,
        )
    for key, rank in (training.lora_rank_pattern or {}).items():
        if rank % 2:
            yield Finding(
                ("training.lora_rank_pattern", "training.lora_init"),
                f"gives {key!r} an odd rank, and lora_init orthogonal wants even ones; give {rank + 1}",
                {key: rank},
            )


def _targets(training: TrainingConfig, modules: Sequence[Module], dims: WhisperDims) -> Findings:
    targets = training.lora_target_modules
    if isinstance(targets, str):
        yield from _regex_target(training, targets, modules)
        return
    for target in targets:
        hits = [module for module in modules if name_ends(module.name, target)]
        if not hits:
            message = f"matches no module of {training.base_model}; {_way_out(target, modules, dims)}"
            yield Finding((TARGETS, BASE), message, target)
        else:
            yield from _usable(training, hits, target, shown=target)


def _regex_target(training: TrainingConfig, regex: str, modules: Sequence[Module]) -> Findings:
    hits = [module for module in modules if matches_targets(regex, module.name)]
    if hits:
        yield from _usable(training, hits, regex, shown=hits[0].name)
        return
    within = any(re.search(regex, module.name) for module in modules)
    hint = f"did you mean {f'.*{regex}.*'!r}?" if within else "check it against such a name"
    message = f"matches no module of {training.base_model}; it must match whole names such as {_EXAMPLE}: {hint}"
    yield Finding((TARGETS, BASE), message, regex)


def _usable(training: TrainingConfig, hits: list[Module], target: str, shown: str) -> Findings:
    """Whether the modules that a target matches can have an adapter, and will."""
    free = [module for module in hits if not is_saved(training.modules_to_save, module.name)]
    if not free:
        message = "lies in modules_to_save, which trains it in full already; name it in one of the two"
        yield Finding((TARGETS, SAVED), message, target)
        return
    live = [module for module in free if not (training.freeze_encoder and in_encoder(module.name))]
    wrong = [module for module in live if module.kind not in ADAPTABLE or module.name == HEAD]
    if wrong and target.lower() != ALL_LINEAR:
        first = wrong[0]
        if first.name in (HEAD, EMBEDDING):
            what = "the token embedding, which is the output head too; give modules_to_save: [embed_tokens] instead"
        else:
            what = _NOT_ADAPTABLE[first.kind].format(example=_inside(first.name))
        matched = "is" if shown == target and name_ends(first.name, target) else f"matches {first.name},"
        yield Finding((TARGETS, BASE), f"{matched} {what}", target)
    elif not live:
        message = "matches modules of the encoder only, and freeze_encoder leaves that as it is; change one of the two"
        yield Finding((TARGETS, FROZEN), message, target)


def _inside(name: str) -> str:
    if name.endswith("_attn"):
        return f"{name.rsplit('.', 1)[-1]}.q_proj"
    return "q_proj" if "encoder" in name or "decoder" in name else "q_proj or fc1"


def _saved(training: TrainingConfig, modules: Sequence[Module], names: list[str]) -> Findings:
    by_name = {module.name: module for module in modules}
    full = saved_modules(training.modules_to_save, names)
    for wanted in training.modules_to_save or ():
        exact = [name for name in names if name_ends(name, wanted)]
        hit = saved_modules([wanted], names)
        kinds = {by_name[name].kind for name in hit}
        if not exact:
            message = f"matches no module of {training.base_model}; {_way_out(wanted, modules)}"
            if hit:
                message = f"is the end of {hit[0].rsplit('.', 1)[-1]!r} and no module's name; give the whole name"
            yield Finding((SAVED, BASE), message, wanted)
        elif wanted == HEAD:
            message = "is the same matrix as embed_tokens; name embed_tokens, and both stay tied"
            yield Finding((SAVED,), message, wanted)
        elif "list" in kinds:
            message = "is a list of layers, which PEFT cannot save as one; name a layer, such as decoder.layers.0"
            yield Finding((SAVED,), message, wanted)
        elif "activation" in kinds:
            yield Finding((SAVED,), "has no weights to train; take it out", wanted)
        elif any(EMBEDDING.startswith(f"{name}.") for name in hit):
            message = "holds the token embedding, which would come apart from the output head; name its parts instead"
            yield Finding((SAVED,), f"{message}, such as decoder.layers.0 and embed_tokens", wanted)
        elif training.freeze_encoder and all(in_encoder(name) for name in hit):
            yield Finding((SAVED, FROZEN), "lies in the encoder, and freeze_encoder leaves that as it is", wanted)
        elif training.freeze_encoder and (heard := [name for name in hit if in_encoder(name)]):
            other = next(name for name in hit if not in_encoder(name))
            message = f"matches {heard[0]} too, and freeze_encoder leaves that as it is; name the decoder's, such as"
            yield Finding((SAVED, FROZEN), f"{message} {other.removeprefix('model.')}", wanted)
        elif nested := [(name, outer) for name in hit for outer in full if name.startswith(f"{outer}.")]:
            inner, outer = (name.removeprefix("model.") for name in nested[0])
            matched = "lies" if inner == wanted else f"matches {inner}, which lies"
            yield Finding((SAVED,), f"{matched} in {outer}, and that is trained in full already; take it out", wanted)
        elif len(hit) > len(exact):
            others = sorted({name.rsplit(".", 1)[-1] for name in hit} - {name.rsplit(".", 1)[-1] for name in exact})
            yield advice(SAVED, f"is the end of {', '.join(others)} too, and PEFT trains those with it", wanted)


def _pattern(
    training: TrainingConfig, setting: str, names: list[str], reachable: list[str], dims: WhisperDims
) -> Findings:
    pattern: dict[str, int] = getattr(training, setting) or {}
    won = {pattern_key(pattern, name) for name in reachable}
    for key in pattern:
        path = f"training.{setting}"
        if key in won:
            continue
        if any(pattern_key({key: 1}, name) for name in reachable):
            yield advice(path, "never takes effect: keys before it match all its modules first", key)
        elif without := [name for name in names if pattern_key({key: 1}, name)]:
            message = f"matches no module with an adapter (only such as {without[-1]}); add it to lora_target_modules"
            if training.freeze_encoder and all(in_encoder(name) for name in without):
                message = "matches modules of the encoder only, and freeze_encoder leaves that without adapters"
            yield Finding((path, TARGETS, BASE, FROZEN), message, key)
        else:
            modules = [Module(name, "container") for name in names]
            message = f"matches no module of {training.base_model}; {_way_out(key, modules, dims)}"
            yield Finding((path, BASE), message, key)


def _conv_init(training: TrainingConfig, modules: Sequence[Module]) -> Findings:
    if training.lora_init in (True, False, "gaussian"):
        return
    convs = [m.name for m in modules if m.kind == "conv1d" and matches_targets(training.lora_target_modules, m.name)]
    if convs and not training.freeze_encoder:
        message = (
            f"has no {training.lora_init} start for the convolution {convs[0]}; take it out of lora_target_modules"
        )
        yield Finding(("training.lora_init", TARGETS), message, training.lora_init)


def _way_out(name: str, modules: Sequence[Module], dims: WhisperDims | None = None) -> str:
    """The nearest names with as many parts, or what is wrong with the layer's number."""
    if dims and (index := re.search(r"\b(encoder|decoder)\.layers\.(\d+)\b", name)):
        count = dims.encoder_layers if index[1] == "encoder" else dims.decoder_layers
        if int(index[2]) >= count:
            return f"its {index[1]} has {count} layers, 0 to {count - 1}"
    depth = name.count(".") + 1
    endings = dict.fromkeys(".".join(module.name.split(".")[-depth:]) for module in modules)
    close = nearest(name, endings, count=2)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "its layers hold q_proj, k_proj, v_proj, out_proj, fc1 and fc2"
