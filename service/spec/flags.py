"""Flags that set parts of a spec, made from the table of settings. stdlib and pydantic only.

Every key of `training` and the job's `name` have a flag of their own (`--lora-r 16`, `--use-dora/--no-use-dora`,
`--lora-target-modules q_proj k_proj`); `--set section.setting=value` sets anything else. Nothing is parsed here beyond
words: what a flag says goes through `load_spec` as it stands, so that a bad value is a fault like any other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from service.spec.settings import Setting, by_bare_name, settings

CONFIG_FLAG = "--config"
SET_FLAG = "--set"
NO_WARNINGS_FLAG = "--no-warnings"
SET_HELP = "Set any setting of the spec, e.g. engine.weight_decay=0.01. May be given several times."


@dataclass(frozen=True)
class Override:
    """One value that takes the place of a file's or a default.

    Attributes:
        path: the setting, `training.lora_r`. May be unknown: load_spec says so.
        label: what an error calls its source: `--lora-r`, `--set training.lora_r`, `trial 7`.
    """

    path: str
    value: Any
    label: str


Overrides = Sequence[Override]


@dataclass(frozen=True)
class Flag:
    """A flag of one setting."""

    setting: Setting
    option: str

    @property
    def negation(self) -> str | None:
        """The flag that switches it off."""
        return f"--no-{self.option.removeprefix('--')}" if self.setting.is_switch else None

    @property
    def dest(self) -> str:
        """Name of the parsed value; a dot keeps it apart from a parser's other names."""
        return f"setting.{self.setting.path}"

    @property
    def metavar(self) -> str:
        """What the help calls its value."""
        for kind, word in (("array", "NAME"), ("object", "JSON"), ("integer", "N"), ("number", "X")):
            if kind in self.setting.types:
                return word
        return "TEXT"

    @property
    def help(self) -> str:
        """One sentence and the default."""
        default = self.setting.default
        shown = " ".join(default) if isinstance(default, list) else json.dumps(default).strip('"')
        return f"{self.setting.summary} [default: {shown}]" if default is not None else self.setting.summary


@cache
def flags() -> tuple[Flag, ...]:
    """All flags, `--name` first, then in the order of the settings."""
    return tuple(Flag(setting, setting.flag) for setting in settings().values() if setting.flag)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, `--no-warnings`, all flags and `--set` to a parser; read them with `overrides_from`."""
    parser.add_argument(CONFIG_FLAG, metavar="SPEC", help="Job spec, YAML or JSON.")
    parser.add_argument(NO_WARNINGS_FLAG, action="store_true", help="Leave out the spec's warnings: they were shown.")
    group = parser.add_argument_group("settings (flag, then file, then default)")
    for flag in flags():
        common: dict[str, Any] = {"dest": flag.dest, "default": None}
        text = flag.help.replace("%", "%%")
        if flag.negation:
            group.add_argument(flag.option, action="append_const", const=True, help=text, **common)
            group.add_argument(flag.negation, action="append_const", const=False, help=argparse.SUPPRESS, **common)
        elif flag.setting.is_list:
            group.add_argument(flag.option, nargs="+", action="extend", metavar=flag.metavar, help=text, **common)
        else:
            group.add_argument(flag.option, action="append", metavar=flag.metavar, help=text, **common)
    group.add_argument(SET_FLAG, dest="set", action="append", default=[], metavar="PATH=VALUE", help=SET_HELP)


def overrides_from(namespace: argparse.Namespace) -> list[Override]:
    """What the flags of `add_to` said."""
    return overrides_of(vars(namespace), namespace.set)


def overrides_of(values: Mapping[str, Any], assignments: Iterable[str]) -> list[Override]:
    """Overrides from parsed flags.

    Args:
        values: values by `Flag.dest`; None or an empty sequence where a flag was not given.
        assignments: what followed each `--set`.
    """
    overrides = []
    for flag in flags():
        given = values.get(flag.dest) or ()
        if flag.setting.is_list and given:
            # One word may be a regular expression or JSON, so it stays as it is.
            given = [given[0] if len(given) == 1 else list(given)]
        for value in given:  # of several, load_spec says that they contradict each other
            option = flag.negation if flag.negation and not value else flag.option
            plain = value if flag.negation or flag.setting.is_list else scalar(value, flag.setting)
            overrides.append(Override(flag.setting.path, plain, option))
    return overrides + [_assignment(text) for text in assignments]


def _assignment(text: str) -> Override:
    path, equals, value = text.partition("=")
    written = path.strip()
    path = by_bare_name(written)
    return Override(path, scalar(value, settings().get(path)) if equals else _NO_VALUE, f"{SET_FLAG} {written}")


class _NoValue:
    def __repr__(self) -> str:
        return "no value"


_NO_VALUE = _NoValue()


def has_value(override: Override) -> bool:
    """Whether an override came with a value (`--set name` without `=` did not)."""
    return not isinstance(override.value, _NoValue)


def scalar(text: str, setting: Setting | None) -> Any:
    """The value that a word on the command line stands for: JSON where it is JSON, else the word itself.

    A setting that takes only text keeps it: `--set training.outdir=2024` names a folder.
    """
    if setting is not None and setting.types == ("string",) and text.strip() != "null":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
