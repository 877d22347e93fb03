"""A job's log on the screen while it runs: a live line of progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from service.cli.cluster import come_back
from service.errors import LeftError, UnreachableError

if TYPE_CHECKING:
    from service.client.api import Api
    from service.client.progress import Progress
    from service.client.record import JobRecord


class Screen:
    """Shows the lines of a log on stderr, and keeps what they say of the progress."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.status import Status

        from service.client.progress import Progress

        self.progress = Progress()
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Status | None = None

    def take(self, line: str) -> None:
        """Show one line of the log."""
        from service.client.progress import advance, read_line

        self.progress = advance(self.progress, line)
        event = read_line(line)
        if self._console.is_terminal:
            self._update(self.progress)
            if event and event["event"] == "progress":
                return
            self._console.print(line, markup=False)
        else:
            click.echo(line, err=True)

    def tell(self, text: str) -> None:
        """Show what goes on with the connection."""
        self._console.print(f"note: {text}", markup=False)

    def close(self) -> None:
        """Take the live line off the screen."""
        if self._live:
            self._live.stop()
            self._live = None

    def _update(self, progress: Progress) -> None:
        if self._live is None:
            self._live = self._console.status("", spinner="dots")
            self._live.start()
        from rich.markup import escape

        self._live.update(escape(f"{progress.elapsed or ''}  {progress.words()}"))


@contextlib.contextmanager
def leaving(job_id: str, goes_on: str = "goes on without you; come back with") -> Iterator[None]:
    """Ctrl-C ends the watching, not the job; and a cluster that does not answer is left with the way back.

    Args:
        job_id: the job.
        goes_on: what is said of it.

    Raises:
        LeftError: Ctrl-C came.
        UnreachableError: the cluster did not answer for too long.
    """
    back = come_back("logs -f", job_id)
    try:
        yield
    except KeyboardInterrupt:
        text = f"{job_id} {goes_on}: {back}"
        raise LeftError(f"{text}\n       or end it with: {come_back('stop', job_id)}") from None
    except UnreachableError as error:
        raise UnreachableError(f"{error}. The job itself may well go on; come back with: {back}") from error


def follow_on_screen(api: Api, job_id: str) -> tuple[JobRecord, Progress]:
    """Show a job's log until it has ended."""
    from service.client.follow import follow

    screen = Screen()
    api.forget_errands()
    with leaving(job_id):
        try:
            return follow(api, job_id, screen.take, screen.tell), screen.progress
        finally:
            screen.close()


def wait_quietly(api: Api, job_id: str) -> JobRecord:
    """Wait for a job's end without its log."""
    from service.client.follow import wait

    api.forget_errands()
    with leaving(job_id):
        return wait(api, job_id, lambda text: click.echo(f"note: {text}", err=True))
