"""Options that several commands share: the spec with its flags, and the form of the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from service.spec.flags import CONFIG_FLAG, SET_FLAG, SET_HELP, Flag, Override, flags, overrides_of
from service.spec.job import WITHOUT_TRAINING
from service.spec.load import LoadedSpec, load_spec
from service.spec.paths import MODELS, PATHS
from service.spec.settings import FLAT

Function = Callable[..., Any]

SPEC_SUFFIXES = (".json", ".yaml", ".yml")
_DEBUG = "whisper-jobs.debug"
LISTS = ("--formats",)
"""Options that take several words, beside those of the settings."""
SWITCH_VALUES = {"true", "false", "yes", "no", "on", "off", "0", "1"}


@dataclass(frozen=True)
class SpecInput:
    """A spec as the command line names it: a file, flags, or both."""

    source: Path | None
    overrides: list[Override]

    def load(self, *more: Override, unless_set: Sequence[Override] = (), check_files: bool = True) -> LoadedSpec:
        """Read and check it.

        Args:
            more: values that a command itself sets.
            unless_set: values that flags take the place of.
            check_files: whether what it names must be on this machine.

        Raises:
            SpecError: with every fault there is.
        """
        return load_spec(self.source, [*unless_set, *self.overrides, *more], check_files=check_files)


def output_options(function: Function) -> Function:
    """`-o/--output`, passed on as `output`, and `--debug`."""

    @click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the result.")
    @click.option("--debug", is_flag=True, expose_value=False, callback=_keep, help="Show the traceback of an error.")
    @wraps(function)
    def with_output(**values: Any) -> Any:
        return function(**values)

    return with_output


def is_debug() -> bool:
    """Whether the present command has been given `--debug`."""
    return bool(click.get_current_context().meta.get(_DEBUG))


def _keep(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[_DEBUG] = value
    return value


def with_options(*options: Function) -> Function:
    """A decorator that adds options, shown in this order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def spec_options(function: Function) -> Function:
    """`--config` and a flag for every setting, passed on with the argument SPEC, if there is one, as `spec_input`."""
    return _with_spec(function, flags(), flags())


def untrained_spec_options(function: Function) -> Function:
    """The same for a command that trains nothing: flags that would do nothing there are none of its options."""
    counting = [flag for flag in flags() if flag.setting.section != FLAT or flag.setting.name in WITHOUT_TRAINING]
    return _with_spec(function, counting, counting)


def checked_spec_options(function: Function) -> Function:
    """The same for a command that looks at what a job needs: it takes all flags, and shows those that it looks at."""
    return _with_spec(function, flags(), [flag for flag in flags() if flag.setting.path in ("name", *PATHS, *MODELS)])


def _with_spec(function: Function, taken: Sequence[Flag], shown: Sequence[Flag]) -> Function:
    @wraps(function)
    def with_spec(**values: Any) -> Any:
        settings = {flag.dest: values.pop(_identifier(flag)) for flag in taken}
        argument, config = values.pop("spec", None), values.pop("config")
        if argument and config:
            raise click.UsageError(f"SPEC is given twice: {argument} and {CONFIG_FLAG} {config}")
        source = argument or config
        overrides = overrides_of(settings, values.pop("assignments"))
        return function(spec_input=SpecInput(Path(source) if source else None, overrides), **values)

    decorated: Function = with_options(*_options(taken, shown))(with_spec)
    return decorated


def _options(taken: Sequence[Flag], shown: Sequence[Flag]) -> list[Function]:
    options: list[Function] = [
        click.option(CONFIG_FLAG, metavar="SPEC", help="The spec, as an option."),
        click.option(SET_FLAG, "assignments", metavar="PATH=VALUE", multiple=True, help=SET_HELP),
    ]
    for flag in taken:
        names = (f"{flag.option}/{flag.negation}" if flag.negation else flag.option, _identifier(flag))
        kind: dict[str, Any] = {"default": (), "multiple": True, "help": flag.help, "hidden": flag not in shown}
        if not flag.negation:
            kind |= {"metavar": f"{flag.metavar}..." if flag.setting.is_list else flag.metavar, "type": str}
        options.append(click.option(*names, **kind))
    return options


def _identifier(flag: Flag) -> str:
    return f"setting_{flag.setting.name}"


class SpecCommand(click.Command):
    """A command with flags that take several words (`--lora-target-modules q_proj k_proj`), which Click has not."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Spell a list out as one flag per word. A spec that a list has swallowed is given back."""
        spread = _spread(args)
        if "spec" in {parameter.name for parameter in self.params} and self._lacks_spec(ctx, spread):
            spread = _spread(args, give_back=True)
        return super().parse_args(ctx, spread)

    def _lacks_spec(self, ctx: click.Context, args: list[str]) -> bool:
        try:
            values, _, _ = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError:
            return False  # the real parse will say so
        return not any(isinstance(values.get(name), str) for name in ("spec", "config"))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own options first, those of the settings below them."""
        options = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        records = [(p, record) for p in options if (record := p.get_help_record(ctx)) is not None]
        settings = [record for p, record in records if (p.name or "").startswith("setting_")]
        with formatter.section("Options"):
            formatter.write_dl([record for _, record in records if record not in settings])
        with formatter.section("Settings (flag, then file, then default)"):
            formatter.write_dl(settings)


def _spread(args: list[str], *, give_back: bool = False) -> list[str]:
    lists = {flag.option for flag in flags() if flag.setting.is_list} | set(LISTS)
    switches = {name for flag in flags() if flag.negation for name in (flag.option, flag.negation)}
    spread: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*spread, word, *rest]
        if word in switches and rest and rest[0].lower() in SWITCH_VALUES and not Path(rest[0]).is_file():
            positive = word.replace("--no-", "--", 1)
            raise click.UsageError(
                f"{word} takes no value; write {positive} or --no-{positive.removeprefix('--')}, without {rest[0]}"
            )
        if word not in lists:
            spread.append(word)
            continue
        values = []
        while rest and not (rest[0].startswith("-") and len(rest[0]) > 1):
            values.append(rest.pop(0))
        if not values:
            raise click.UsageError(f"{word} needs at least one word")
        returned = [values.pop()] if give_back and len(values) > 1 and _looks_like_spec(values[-1]) else []
        for value in values:
            spread += [word, value]
        spread += returned
    return spread


def _looks_like_spec(word: str) -> bool:
    return word.lower().endswith(SPEC_SUFFIXES) or Path(word).is_file()
