"""`status`, `list`, `logs` and `stop`: jobs on a cluster, also those that `ray job submit` has submitted."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from service.cli.cluster import address_option, complete_job, find_job, job_facts, job_rows, print_rows, time_text
from service.cli.following import leaving
from service.cli.options import output_options
from service.cli.output import print_json
from service.errors import EXIT_DONE, NotFoundError, UnreachableError

if TYPE_CHECKING:
    from service.client.api import Api
    from service.client.progress import Progress
    from service.client.record import JobRecord


@click.command()
@click.argument("job", shell_complete=complete_job)
@address_option
@output_options
def status(api: Api, job: str, output: str) -> int:
    """How far JOB is: state, stage, step, loss, WER and time left.

    JOB is a submission id, a job id or a name. The exit code is that of its outcome; 6 while it has none.
    """
    record = find_job(api, job)
    progress = _progress_of(api, record)
    if output == "json":
        print_json(job_facts(record, progress))
    else:
        print_rows(record.submission_id, job_rows(record, progress))
    return record.exit_code


@click.command("list")
@click.option("--all", "every", is_flag=True, help="Also jobs that are not of whisper-jobs.")
@click.option("-n", "count", type=click.IntRange(1), default=20, help="How many at most, the newest first.")
@address_option
@output_options
def list_jobs(api: Api, every: bool, count: int, output: str) -> int:
    """List the jobs of a cluster, the newest first."""
    from service.client.check import ERRAND_PREFIX

    jobs = [one for one in api.jobs() if every or one.is_ours]
    shown = [one for one in jobs if not one.submission_id.startswith(ERRAND_PREFIX)][:count]
    progress = {one.submission_id: _progress_of(api, one) for one in shown if not one.status.is_terminal}
    if output == "json":
        print_json([job_facts(one, progress.get(one.submission_id)) for one in shown])
        return EXIT_DONE
    if not shown:
        click.echo(f"{api.cluster.url} has no jobs", err=True)
        return EXIT_DONE
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("job", "kind", "state", "submitted", "progress, or why it failed"):
        table.add_column(title, overflow="fold", no_wrap=title != "progress, or why it failed")
    for one in shown:
        at = progress.get(one.submission_id)
        words = at.words() if at and at.stage else one.reason
        kind = one.metadata.get("kind", "")
        table.add_row(*map(escape, (one.submission_id, kind, one.outcome, time_text(one.started_ms), words)))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    return EXIT_DONE


@click.command()
@click.argument("job", shell_complete=complete_job)
@click.option(
    "-f", "--follow", is_flag=True, help="Go on until the job has ended; the exit code is that of its outcome."
)
@click.option("--tail", type=click.IntRange(0), metavar="N", help="The last N lines only, and what comes.")
@address_option
@output_options
def logs(api: Api, job: str, follow: bool, tail: int | None, output: str) -> int:
    """Print what JOB has said. With -o json, one object a line: what each line says of the job's progress."""
    from service.client.follow import follow as follow_log
    from service.client.record import lines_of

    record = find_job(api, job)
    if not follow:
        _print_lines(_last(lines_of(api.logs(record.submission_id)), tail), output)
        return EXIT_DONE
    said = lines_of(api.logs(record.submission_id)) if tail is not None else []
    skip = max(0, len(said) - tail) if tail is not None else 0

    def take(line: str) -> None:
        nonlocal skip
        if skip:
            skip -= 1
        else:
            _print_lines([line], output)

    with leaving(record.submission_id):
        ended = follow_log(api, record.submission_id, take, lambda text: click.echo(f"note: {text}", err=True))
    if ended.exit_code:
        click.echo(f"{ended.submission_id}  {ended.outcome}{f': {ended.reason}' if ended.reason else ''}", err=True)
    return ended.exit_code


@click.command()
@click.argument("job", shell_complete=complete_job)
@click.option(
    "--grace",
    metavar="S",
    type=click.FloatRange(0, 600),
    help="Seconds that it has for a checkpoint; then it is killed, and an earlier checkpoint counts. Default: 300.",
)
@address_option
@output_options
def stop(api: Api, job: str, grace: float | None, output: str) -> int:
    """Stop JOB with a checkpoint. `whisper-jobs resume JOB` goes on from there."""
    from service.client.stop import DEFAULT_GRACE_S
    from service.client.stop import stop as stop_job

    record = find_job(api, job)
    before = record.status.is_terminal
    grace_s = DEFAULT_GRACE_S if grace is None else grace
    with leaving(record.submission_id, goes_on="was asked to stop, and may still write its checkpoint; look with"):
        ended = stop_job(api, record, grace_s, lambda text: click.echo(f"note: {text}", err=True))
    if output == "json":
        print_json(job_facts(ended))
    elif before:
        print_rows(f"{ended.submission_id} had ended already", job_rows(ended))
    else:
        click.echo(f"{ended.submission_id}  {ended.outcome}{_checkpoint(api, ended)}")
    return EXIT_DONE


def _checkpoint(api: Api, record: JobRecord) -> str:
    """What the job itself said of its end."""
    from service.client.record import lines_of

    try:
        said = [line for line in lines_of(api.logs(record.submission_id)) if line.startswith("error: stopped")]
    except (UnreachableError, NotFoundError):
        return ""
    return f": {said[-1].removeprefix('error: ')}" if said else ""


def _progress_of(api: Api, record: JobRecord) -> Progress | None:
    """What its log says; None where that cannot be read."""
    from service.client.progress import Progress, advance
    from service.client.record import lines_of

    progress = Progress()
    try:
        for line in lines_of(api.logs(record.submission_id)):
            progress = advance(progress, line)
    except (UnreachableError, NotFoundError):
        return None
    return progress


def _last(lines: list[str], count: int | None) -> Iterable[str]:
    return lines if count is None else deque(lines, maxlen=count)


def _print_lines(lines: Iterable[str], output: str) -> None:
    from service.client.progress import read_line

    for line in lines:
        if output == "json":
            click.echo(json.dumps((read_line(line) or {"event": "line"}) | {"line": line}, ensure_ascii=False))
        else:
            click.echo(line)
