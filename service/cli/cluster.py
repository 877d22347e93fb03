"""What the commands that talk to a cluster share: its address, finding a job, and showing one."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from service.cli.output import warn
from service.errors import NotFoundError, WhisperJobsError

if TYPE_CHECKING:
    from service.client.api import Api
    from service.client.progress import Progress
    from service.client.record import JobRecord

Function = Callable[..., Any]

ADDRESS = "whisper-jobs.address"


def address_word(function: Function) -> Function:
    """`--address`, passed on as it is, for commands that may need no cluster."""
    return click.option(
        "--address",
        metavar="URL",
        help="Dashboard of the Ray cluster. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265.",
    )(function)


def address_option(function: Function) -> Function:
    """`--address`, passed on as `api`: the calls to that cluster, for as long as the command runs."""

    @address_word
    @wraps(function)
    def with_api(address: str | None, **values: Any) -> Any:
        keep_address(address)
        with opened(address) as api:
            return function(api=api, **values)

    return with_api


def keep_address(address: str | None) -> None:
    """Have the hints of this command name the address that it was given."""
    click.get_current_context().meta[ADDRESS] = address


@contextlib.contextmanager
def opened(address: str | None) -> Iterator[Api]:
    """Calls to the cluster of that address, or of the environment."""
    from service.client.address import find_cluster
    from service.client.api import Api

    cluster = find_cluster(address)
    if cluster.sends_token_in_clear:
        warn([f"the token goes to {cluster.url} unencrypted; give an https:// address where others share the network"])
    with Api(cluster) as api:
        yield api


def come_back(command: str, job_id: str) -> str:
    """The command line that goes on with a job, with the address that this one was given."""
    address = click.get_current_context().meta.get(ADDRESS)
    return f"whisper-jobs {command} {job_id}{f' --address {shlex.quote(address)}' if address else ''}"


def find_job(api: Api, name: str) -> JobRecord:
    """A job by its submission id, its job id or its name; of several, the one that was submitted last.

    Raises:
        NotFoundError: there is none.
    """
    from service.spec.settings import nearest

    jobs = api.jobs()  # the newest first
    for record in jobs:
        if name in (record.job_id, record.metadata.get("name")):
            return record
    for record in jobs:
        if name == record.submission_id:
            return record
    close = nearest(name, [record.submission_id for record in jobs if record.is_ours])
    way_out = f"did you mean {close[0]}?" if close else "`whisper-jobs list` shows those it has"
    raise NotFoundError(f"{api.cluster.url}: knows of no job {name}; {way_out}")


def complete_job(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The cluster's jobs, for a shell that completes a word; nothing where none answers."""
    from service.client.address import find_cluster
    from service.client.api import Api

    try:
        with Api(find_cluster(context.params.get("address")), patience_s=0) as api:
            found = [record.job_id for record in api.jobs() if record.is_ours]
    except WhisperJobsError:
        return []
    return [name for name in dict.fromkeys(found) if name.startswith(incomplete)]


def job_facts(record: JobRecord, progress: Progress | None = None) -> dict[str, Any]:
    """A job for programs."""
    return record.as_dict() | ({"progress": progress.as_dict()} if progress else {})


def job_rows(record: JobRecord, progress: Progress | None = None) -> list[tuple[str, str]]:
    """A job in words, as label and text."""
    from service.client.record import Status

    rows = [("state", f"{record.outcome}{f' (exit code {record.exit_code})' if record.reason else ''}")]
    if record.reason:
        rows.append(("reason", record.reason))
    if progress and progress.stage and record.status is Status.RUNNING:
        rows.append(("progress", progress.words()))
    elif progress and progress.wer is not None:
        before = f"{progress.base_wer:.1%} -> " if progress.base_wer is not None else ""
        rows.append(("WER", f"{before}{progress.wer:.1%}"))
    rows.append(("submitted", f"{time_text(record.started_ms)}{_lasted(record)}"))
    if root := record.root or (progress.root if progress else None):
        rows.append(("root", root))
    return rows


def print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A title and facts below it."""
    click.echo(title)
    for label, text in rows:
        click.echo(f"  {label:<10} {text}")


def time_text(unix_ms: int) -> str:
    """A time in this machine's zone."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _lasted(record: JobRecord) -> str:
    if record.ended_ms is None:
        return ""
    seconds = round((record.ended_ms - record.started_ms) / 1000)
    return f", ended after {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
