"""Every setting of a job spec as a table, made from the models: flags, help, docs and error messages read it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from service.spec.base import Spec
from service.spec.job import JobSpec

FLAT = "training"
"""The section whose settings stand at top level in a file of the old toolkit, and are flags by their own names."""

OTHER_NAMES = {
    "alpha": "lora_alpha",
    "batch_size": "per_dev_batch",
    "dropout": "lora_dropout",
    "eval_csv": "val_csv",
    "gradient_accumulation_steps": "grad_accum",
    "init_lora_weights": "lora_init",
    "learning_rate": "lr",
    "lora_rank": "lora_r",
    "lr_scheduler_type": "lr_scheduler",
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "num_workers": "workers",
    "output_dir": "outdir",
    "per_device_train_batch_size": "per_dev_batch",
    "rank": "lora_r",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "target_modules": "lora_target_modules",
    "warmup_steps": "warmup_ratio",
}
"""What other tools call our settings: only to point the way in an error."""


SENTENCE_END = r"(?<=[^ .]\.) (?=[A-Z0-9`])"
"""The space behind a sentence. A dot of a formula has a space before it: `B . (W A^T)`."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        path: where it stands in a spec: `training.lora_r`, or `name` at top level.
        default: as JSON.
        schema: the JSON schema of its values.
    """

    path: str
    section: str
    name: str
    doc: str
    default: Any
    schema: dict[str, Any]

    @property
    def flag(self) -> str | None:
        """The flag that sets it by name; None where only `--set` does."""
        return f"--{self.name.replace('_', '-')}" if self.section == FLAT or self.path == "name" else None

    @property
    def types(self) -> tuple[str, ...]:
        """JSON types of its values, null left out."""
        return tuple(
            dict.fromkeys(kind for branch in self._branches if (kind := branch.get("type")) not in (None, "null"))
        )

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off, so that its flag takes no value."""
        return self.types == ("boolean",)

    @property
    def is_list(self) -> bool:
        """Whether it holds several names, so that its flag takes several words."""
        return "array" in self.types

    @property
    def items_text(self) -> str:
        """What a list holds, in plain words."""
        items: dict[str, Any] = next((branch["items"] for branch in self._branches if "items" in branch), {})
        return "numbers" if items.get("type") in ("number", "integer") else "names"

    @property
    def type_text(self) -> str:
        """The type in plain words."""
        words = {
            "integer": "whole number",
            "number": "number",
            "boolean": "true or false",
            "string": "text",
            "array": f"list of {self.items_text}",
            "object": "object, or a JSON string of one",
            "null": "null",
        }
        parts = []
        for branch in self._branches:
            values = ", ".join(f"`{value}`" for value in branch.get("enum", []))
            parts.append(f"one of {values}" if values else words[branch["type"]])
        return ", or ".join(parts)

    @property
    def range_text(self) -> str:
        """The limits of a number in plain words, or nothing."""
        words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
        return ", ".join(
            f"{word} {json.dumps(branch[key])}"
            for branch in self._branches
            for key, word in words.items()
            if key in branch
        )

    @property
    def example(self) -> Any:
        """A value that it may well have."""
        return self.schema.get("examples", [self.default])[0]

    @property
    def summary(self) -> str:
        """The first sentence of its text."""
        text = " ".join(self.doc.split())
        return re.split(SENTENCE_END, text, maxsplit=1)[0]

    @property
    def _branches(self) -> list[dict[str, Any]]:
        branches = self.schema.get("anyOf", [self.schema])
        return [{**branch, "type": "object"} if "$ref" in branch else branch for branch in branches]


@cache
def settings() -> dict[str, Setting]:
    """Every setting by its path, in the order of the models."""
    table: dict[str, Setting] = {}
    models: dict[str, type[Spec]] = {"": JobSpec, **sections()}
    for section, model in models.items():
        properties = model.model_json_schema()["properties"]
        for name, field in model.model_fields.items():
            if section == "" and name in sections():
                continue
            path = f"{section}.{name}" if section else name
            default = json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))
            table[path] = Setting(path, section, name, field.description or "", default, properties[name])
    return table


@cache
def sections() -> dict[str, type[Spec]]:
    """The models of the sections by name."""
    return {
        name: field.annotation
        for name, field in JobSpec.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Spec)
    }


def find(name: str) -> list[Setting]:
    """The settings of that path or, in any section, of that name; flags and dashes are understood."""
    wanted = name.strip().removeprefix("--").removeprefix("no-").replace("-", "_")
    table = settings()
    if wanted in table:
        return [table[wanted]]
    return [setting for setting in table.values() if setting.name == wanted]


def by_bare_name(name: str) -> str:
    """The path of the one setting of that name, `lora_r` or `weight_decay`; a name of none or of several stays."""
    found = [setting.path for setting in settings().values() if setting.name == name]
    return found[0] if len(found) == 1 and name not in sections() else name


def suggest(name: str, section: str = "") -> list[Setting]:
    """The settings that an unknown name most likely means, best first.

    Args:
        name: the name as it was written, without its section.
        section: the section that it was written in; its settings come first.
    """
    table = settings()
    wanted = name.strip().replace("-", "_").lower()
    known = find(wanted) or find(OTHER_NAMES.get(wanted, ""))
    if known:
        return sorted(known, key=lambda setting: setting.section != section)
    names = {setting.name: setting for setting in reversed(table.values())}
    names |= {setting.name: setting for setting in table.values() if setting.section == section}
    return [names[match] for match in nearest(wanted, names)]


def suggest_section(name: str, close: list[Setting]) -> str:
    """The section that an unknown name most likely means, where that is no setting; empty: there is none.

    Args:
        name: as it was written, without a section.
        close: what `suggest` has for it. A setting may have a section's name (`search.engine`): then it is the section.
    """
    if close and ("." in name or close[0].name not in sections()):
        return ""
    return next(iter(nearest(name, sections())), "")


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known words that look most like a given one, else those that it is a part of (`decay`: `weight_decay`)."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=count, cutoff=cutoff)
    return close or [longer for longer in words if word in longer.split("_")][:count]
