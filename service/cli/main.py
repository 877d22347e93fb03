"""`whisper-jobs`: the group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

from service.cli.failure import exit_code_of, show_failure
from service.writing import understood

COMMANDS = {
    "validate": "service.cli.specs",
    "explain": "service.cli.specs",
    "schema": "service.cli.specs",
    "run": "service.cli.jobs",
    "evaluate": "service.cli.jobs",
    "export": "service.cli.jobs",
    "submit": "service.cli.submit",
    "status": "service.cli.watch",
    "list": "service.cli.watch",
    "logs": "service.cli.watch",
    "stop": "service.cli.watch",
    "resume": "service.cli.submit",
    "doctor": "service.cli.doctor",
    "verify": "service.cli.runs",
    "artifacts": "service.cli.runs",
    "trials": "service.cli.trials",
    "pull": "service.cli.runs",
    "report": "service.cli.reports",
    "compare": "service.cli.reports",
    "manifest": "service.cli.manifests",
    "k8s": "service.cli.k8s",
    "completion": "service.cli.completion",
}
"""Where each command lives; its module is imported when it is called."""

FUNCTIONS = {"list": "list_jobs"}
"""What a command is called in its module, where its name is taken."""


class Commands(click.Group):
    """Commands that are imported on use, and errors that end in one clear message."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which they are needed."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command."""
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[name]), FUNCTIONS.get(name, name))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is meant; of a misspelt one the nearest is named."""
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        close = get_close_matches(name.lower(), COMMANDS, n=1)
        raise click.UsageError(f"No such command {name!r}.{f' Did you mean {close[0]!r}?' if close else ''}", ctx)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **extra: Any) -> Any:
        """Run the command line and end the process with its exit code."""
        words = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        try:
            code = super().main(words, "whisper-jobs", **extra)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the outermost edge
            if "--debug" in words and not isinstance(error, click.ClickException | click.Abort):
                traceback.print_exc()
            shown = understood(error)
            show_failure(shown, as_json=_wants_json(words))
            code = exit_code_of(shown)
        sys.exit(code or 0)


def _wants_json(words: list[str]) -> bool:
    """Whether the output is to be JSON, told from the bare words, since they may be what is wrong."""
    pairs = zip(words, [*words[1:], ""], strict=False)
    return any(
        word in ("-ojson", "--output=json") or (word in ("-o", "--output") and value == "json") for word, value in pairs
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="whisper-jobs", message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune Whisper with LoRA and DoRA as Ray jobs, with the proof that the result is better."""


def main() -> None:
    """Entry point of the command `whisper-jobs`."""
    cli()
