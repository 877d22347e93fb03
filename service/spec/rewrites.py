"""What a spec says in other words than ours, put into ours: `o_proj` is Whisper's `out_proj`."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from pydantic import ValidationError

from service.spec.job import JobSpec
from service.spec.search import Dimension
from service.spec.training import TrainingConfig

_O_PROJ = re.compile(r"(?<!\w)o_proj(?!\w)")


def rewrite(spec: JobSpec) -> tuple[JobSpec, list[tuple[str, str]]]:
    """Put module names into Whisper's own, and name none twice.

    Returns:
        The spec, and (setting, what was done) for each rewriting that its user should know of.
    """
    training, changes, notes = spec.training, {}, []
    for name in ("lora_target_modules", "modules_to_save", "lora_rank_pattern", "lora_alpha_pattern"):
        old = getattr(training, name)
        new = _renamed(old)
        if new != old:
            changes[name] = new
        if _mentions(old):
            notes.append((f"training.{name}", "`o_proj` is taken to mean `out_proj`, as Whisper calls it"))
    if changes:
        spec = spec.model_copy(update={"training": training.model_copy(update=changes)})
    if spec.search.space:
        space = {name: _in_its_type(name, dimension) for name, dimension in spec.search.space.items()}
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"space": space})})
    return spec, notes


def _in_its_type(name: str, dimension: Dimension) -> Dimension:
    """A choice's values as the setting takes them (YAML reads 1e-4 as text), each once; wrong ones stay as they are."""
    if dimension.choice is None or name not in TrainingConfig.model_fields:
        return dimension
    values: list[Any] = []
    for value in dimension.choice:
        with contextlib.suppress(ValidationError):
            value = getattr(TrainingConfig.model_validate({name: value}), name)
        if not any(value == each and type(value) is type(each) for each in values):
            values.append(value)
    return dimension.model_copy(update={"choice": values})


def _renamed(value: Any) -> Any:
    if isinstance(value, str):
        return _O_PROJ.sub("out_proj", value)
    if isinstance(value, list):
        return list(dict.fromkeys(_renamed(name) for name in value))
    if isinstance(value, dict):
        renamed: dict[str, int] = {}
        for key, number in value.items():
            renamed.setdefault(_renamed(key), number)  # the first one that matches wins
        return renamed
    return value


def _mentions(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value or ()
    return any(_O_PROJ.search(name) for name in names)
