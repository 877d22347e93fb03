"""A job's log from its begin to its end, whatever happens to the connection, and the outcome."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection

from service.client.api import Api
from service.client.record import JobRecord
from service.errors import NotFoundError, UnreachableError

PATIENCE_S = 600.0
"""How long a cluster that does not answer is waited for while a job is followed."""

_POLL_S = 1.0
_LOOK_EVERY_S = 5.0
_LONGEST_WAIT_S = 10.0

Say = Callable[[str], None]


class Log:
    """What has come of a job's log, however often it is read from its begin: each line is handed on once.

    Args:
        take: takes a line, without its end.

    Attributes:
        seen: characters of the log that were handed on.
    """

    def __init__(self, take: Say) -> None:
        self._take = take
        self.seen = 0
        self._rest = ""

    def restart(self) -> Reading:
        """The log is going to be read from its begin again."""
        return Reading(self)

    def add(self, text: str, at: int) -> None:
        """Hand on what is new of a piece that stands at this place of the log."""
        new = text[max(0, self.seen - at) :]
        if at > self.seen or not new:
            return
        self.seen += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._take(line)

    def read_whole(self, text: str) -> None:
        """Hand on what is new of the whole log. One that has become shorter is another log: of another driver."""
        if len(text) < self.seen:
            self.seen, self._rest = 0, ""
        self.add(text, 0)

    def finish(self) -> None:
        """Hand on a last line that has no end."""
        if self._rest:
            self._take(self._rest)
            self._rest = ""


class Reading:
    """One pass over a log from its begin.

    Args:
        log: takes it.
    """

    def __init__(self, log: Log) -> None:
        self._log, self._at = log, 0

    def add(self, text: str) -> None:
        """The next piece."""
        self._log.add(text, self._at)
        self._at += len(text)


def follow(api: Api, job_id: str, take: Say, tell: Say, patience_s: float = PATIENCE_S) -> JobRecord:
    """Hand on a job's log as it grows, until the job has ended.

    A connection that breaks, a head that is started again and a log that ends early are got over: the job's state alone
    says when it has ended.

    Args:
        api: the cluster.
        job_id: the submission.
        take: takes each line of the log, once.
        tell: takes a line on what goes on with the connection.
        patience_s: how long a cluster that does not answer is waited for.

    Returns:
        the job as it ended.

    Raises:
        UnreachableError: the cluster has not answered for so long.
        NotFoundError: it does not know the job (any more).
    """
    log, known = Log(take), Watch(api, job_id, tell, patience_s)
    while True:
        before = log.seen
        # Whether the job goes on where the stream does not is asked for below.
        with contextlib.suppress(UnreachableError, ConnectionClosed, OSError), api.tail(job_id) as connection:
            _read(connection, log.restart(), lambda: api.job(job_id).status.is_terminal)
        record = known.look()
        if log.seen == before or record.status.is_terminal:
            _read_whole(api, job_id, log)  # what the stream has left out, or all where a proxy lets none through
        if record.status.is_terminal:
            log.finish()
            return record
        time.sleep(_POLL_S)


def wait(api: Api, job_id: str, tell: Say, patience_s: float = PATIENCE_S) -> JobRecord:
    """Wait for a job's end without its log; see `follow`."""
    known = Watch(api, job_id, tell, patience_s)
    while not (record := known.look()).status.is_terminal:
        time.sleep(_POLL_S)
    return record


class Watch:
    """A job's state, asked for again and again; waits out a cluster that does not answer.

    Args: as of `follow`.
    """

    def __init__(self, api: Api, job_id: str, tell: Say, patience_s: float) -> None:
        self._api, self._job_id, self._tell, self._patience_s = api, job_id, tell, patience_s
        self._seen: JobRecord | None = None

    def look(self) -> JobRecord:
        """The state, now or once the cluster answers again."""
        deadline, pause, told = time.monotonic() + self._patience_s, _POLL_S, False
        while True:
            try:
                record = self._api.job(self._job_id)
            except NotFoundError as error:
                if not self._seen:
                    raise
                root = self._seen.root
                way_out = f"`whisper-jobs resume {root}` goes on with it" if root else "submit it again"
                raise NotFoundError(
                    f"{self._api.cluster.url}: has forgotten job {self._job_id}: its head was lost, and it keeps its "
                    f"state nowhere else. What the job has done is in its storage; {way_out}"
                ) from error
            except UnreachableError as error:
                if time.monotonic() + pause > deadline:
                    raise
                if not told:
                    self._tell(f"{error}; trying again for {self._patience_s:.0f} s, the job itself may well go on")
                    told = True
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT_S)
                continue
            if told:
                self._tell("the cluster answers again")
            self._seen = record
            return record


def _read(connection: ClientConnection, reading: Reading, has_ended: Callable[[], bool]) -> None:
    """Read until the stream ends, or the job does, or the cluster does not answer any more."""
    while True:
        try:
            piece = connection.recv(timeout=_LOOK_EVERY_S)
        except TimeoutError:
            if has_ended():
                return
            continue
        reading.add(piece if isinstance(piece, str) else piece.decode("utf-8", "replace"))


def _read_whole(api: Api, job_id: str, log: Log) -> None:
    """The log in one piece; of a node that has gone there is no more to be had."""
    with contextlib.suppress(UnreachableError, NotFoundError):
        log.read_whole(api.logs(job_id))
