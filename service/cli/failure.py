"""Errors on stderr: one line for one fault, a list for several, JSON with `-o json`; never a traceback."""

from __future__ import annotations

import click

from service.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, Fault, InputError, WhisperJobsError, failure_text

EXIT_USAGE = InputError.exit_code


def exit_code_of(error: BaseException) -> int:
    """What the command ends with."""
    if isinstance(error, WhisperJobsError):
        return error.exit_code
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_USAGE if isinstance(error, click.ClickException) else EXIT_INTERNAL


def show_failure(error: BaseException, *, as_json: bool) -> None:
    """Print an error for its reader."""
    message, faults = _message(error)
    click.echo(failure_text(message, faults, exit_code_of(error), as_json=as_json), err=True)


def _message(error: BaseException) -> tuple[str, list[Fault]]:
    if isinstance(error, InputError):
        return str(error), error.faults
    if isinstance(error, WhisperJobsError):
        return str(error), []
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return "interrupted", []
    if isinstance(error, click.exceptions.NoArgsIsHelpError) and isinstance(error.ctx.command, click.Group):
        known = ", ".join(error.ctx.command.list_commands(error.ctx))
        return f"{error.ctx.command_path} needs a command: {known} ({error.ctx.command_path} --help tells of them)", []
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} ({error.ctx.command_path} --help shows how)", []
    if isinstance(error, click.ClickException):
        return error.format_message(), []
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{reason}; this is a fault of whisper-jobs: run again with --debug for the traceback", []
