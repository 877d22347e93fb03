"""Ray's Jobs API, one method per call. What an answer means is told here, and nowhere else."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import httpx2
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from service.client.address import HOW_TO_GIVE_A_TOKEN, Cluster, tls_context
from service.client.record import JobRecord
from service.errors import Fault, InputError, NotFoundError, UnauthorisedError, UnreachableError

TIMEOUT_S = 15.0
"""How long the dashboard may be silent in one call."""

CONNECT_S = 5.0
PATIENCE_S = 10.0
"""How long a call that changes nothing is made again where the dashboard cannot be reached or answers 5xx."""

LARGEST_BODY = 100 << 20
"""Bytes that the dashboard takes in one request."""

_WAIT_S = 0.5
CALL = "call"
"""In the metadata of a job: a number of the call that has submitted it."""

_SETTLED_S = 2.5
"""Ray looks at a job that has ended once more, a second later, and one that it does not find then it lists anew."""
_SPACE = 30.0
"""Seconds between the pings that tell a connection that is silent from one that is dead."""


class TakenError(Exception):
    """There is a job of that id already."""


class Api:
    """Calls to one cluster.

    Args:
        cluster: where it is.
        patience_s: how long calls that change nothing are made again where no sound answer comes.

    All methods raise UnauthorisedError where the token is refused, and UnreachableError where no Ray dashboard answers.
    """

    def __init__(self, cluster: Cluster, patience_s: float = PATIENCE_S) -> None:
        self.cluster, self.patience_s = cluster, patience_s
        self._errands: dict[str, float] = {}
        self._tls = tls_context()
        try:
            self._http = httpx2.Client(
                base_url=cluster.url,
                headers=cluster.headers,
                timeout=httpx2.Timeout(TIMEOUT_S, connect=CONNECT_S),
                verify=self._tls,
                follow_redirects=False,  # the token is for this address alone
                trust_env=not cluster.is_here,  # what is on this machine is reached through no proxy
            )
        except (ImportError, ValueError) as error:
            text = f"name a proxy that cannot be used ({error}); unset them, or name {cluster.url} in NO_PROXY"
            raise InputError([Fault("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY", text)]) from None

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget_errands()
        self._http.close()

    def version(self) -> dict[str, str]:
        """The cluster's versions: {"ray_version": ..., "session_name": ...}.

        Raises:
            UnreachableError: also where something answers that is no Ray dashboard.
        """
        answer = self._read("/api/version")
        found = self._json(answer) if answer.status_code == 200 else None
        if not isinstance(found, dict) or "ray_version" not in found:
            raise UnreachableError(f"{self.cluster.url}: what answers there is no Ray dashboard; check the address")
        return {str(key): str(value) for key, value in found.items()}

    def jobs(self) -> list[JobRecord]:
        """All jobs that were submitted, the newest first."""
        found = self._json(self._sound(self._read("/api/jobs/")))
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise self._no_dashboard("a list of jobs")
        records = [self._record(entry) for entry in found if entry.get("submission_id")]
        return sorted(records, key=lambda record: record.started_ms, reverse=True)

    def job(self, job_id: str) -> JobRecord:
        """One job.

        Raises:
            NotFoundError: the cluster knows of none.
        """
        return self._record(self._json(self._sound(self._read(self._path(job_id)), job_id)))

    def _record(self, entry: Any) -> JobRecord:
        try:
            return JobRecord.from_api(entry)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise self._no_dashboard("a job") from None

    def _no_dashboard(self, wanted: str) -> UnreachableError:
        text = f"what answers there is no Ray dashboard (it gives no {wanted.split(' ', 1)[1]}); check the address"
        return UnreachableError(f"{self.cluster.url}: {text}")

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Submit a job. Where the answer is lost, or is none, whether the job was taken is asked for.

        Raises:
            TakenError: there is a job of that id, which another client has submitted.
        """
        call = secrets.token_hex(8)
        content: dict[str, Any] = {
            "entrypoint": entrypoint,
            "submission_id": job_id,
            "runtime_env": runtime_env,
            # With a mark of this very call: it is told from the same job of another client.
            "metadata": metadata | {CALL: call},
        }
        try:
            answer = self._once("POST", "/api/jobs/", json=content)
            if answer.status_code >= 400 and "already exists" in answer.text:
                raise TakenError(job_id)
            self._sound(answer)
        except UnreachableError:
            if not self._was_taken(job_id, call):
                raise

    def _was_taken(self, job_id: str, call: str) -> bool:
        """Whether a call to submit a job that brought no sound answer has submitted it: Ray may yet be about to.

        Raises:
            TakenError: another call has.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            with contextlib.suppress(NotFoundError, UnreachableError):
                if self.job(job_id).metadata.get(CALL) == call:
                    return True
                raise TakenError(job_id)
            if time.monotonic() >= deadline:
                return False
            time.sleep(_WAIT_S)

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; whether it was at work.

        Raises:
            NotFoundError: the cluster knows of none.
        """
        answer = self._patiently(lambda: self._once("POST", f"{self._path(job_id)}/stop"))
        return bool(self._json(self._sound(answer, job_id)).get("stopped"))

    def forget(self, job_id: str) -> None:
        """Take a job that has ended off the cluster's list."""
        self._sound(self._patiently(lambda: self._once("DELETE", self._path(job_id))), job_id)

    def forget_later(self, job_id: str) -> None:
        """Have `forget_errands` take a job that has just ended off the cluster's list."""
        self._errands[job_id] = time.monotonic()

    def forget_errands(self) -> None:
        """Take off the list what is to be forgotten: when this connection is closed at the latest."""
        while self._errands:
            job_id, ended = self._errands.popitem()
            time.sleep(max(0.0, ended + _SETTLED_S - time.monotonic()))
            # One that stays on the list harms nobody, and the next errand takes it off.
            with contextlib.suppress(UnreachableError, UnauthorisedError, NotFoundError):
                self._sound(self._once("DELETE", self._path(job_id)), job_id)

    def logs(self, job_id: str) -> str:
        """All that a job has said so far.

        Raises:
            NotFoundError: the cluster knows of no such job.
        """
        return str(self._json(self._sound(self._read(f"{self._path(job_id)}/logs"), job_id)).get("logs") or "")

    @contextlib.contextmanager
    def tail(self, job_id: str) -> Iterator[ClientConnection]:
        """A connection on which the job's log comes, from its begin.

        Raises:
            UnreachableError: it cannot be made.
        """
        url = self.cluster.url.replace("http", "ws", 1) + f"{self._path(job_id)}/logs/tail"
        try:
            connection = connect(
                url,
                additional_headers=self.cluster.headers,
                ssl=self._tls if url.startswith("wss") else None,
                open_timeout=TIMEOUT_S,
                ping_interval=_SPACE,
                ping_timeout=_SPACE,
                close_timeout=1,
                max_size=None,
                proxy=None if self.cluster.is_here else True,
                # Ray's dashboard passes the offer on to a process behind it, and cannot read what that compresses.
                compression=None,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            self._refuse_unauthorised(status)
            raise UnreachableError(f"{self.cluster.url}: the log cannot be followed (HTTP {status})") from error
        except (OSError, InvalidHandshake, WebSocketException, TimeoutError, ImportError) as error:
            raise UnreachableError(self._silence(error)) from error
        with connection:
            yield connection

    def has_package(self, name: str) -> bool:
        """Whether the cluster has this working directory already. It is kept a while for a job to come."""
        answer = self._read(f"/api/packages/gcs/{name}")
        if answer.status_code == 404:
            return False
        self._sound(answer)
        return True

    def put_package(self, name: str, content: bytes) -> None:
        """Bring a working directory to the cluster.

        Raises:
            InputError: it is larger than the dashboard takes.
        """
        if len(content) > LARGEST_BODY:
            text = f"is {len(content) >> 20} MiB; the dashboard takes {LARGEST_BODY >> 20} MiB in one request"
            raise InputError([Fault("the job's code and spec", text)])
        self._sound(self._patiently(lambda: self._once("PUT", f"/api/packages/gcs/{name}", content=content)))

    @staticmethod
    def _path(job_id: str) -> str:
        return f"/api/jobs/{quote(job_id, safe='')}"

    def _read(self, path: str) -> httpx2.Response:
        return self._patiently(lambda: self._once("GET", path))

    def _patiently(self, call: Callable[[], httpx2.Response]) -> httpx2.Response:
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                answer = call()
                if answer.status_code < 500 or time.monotonic() + _WAIT_S >= deadline:
                    return answer
            except UnreachableError:
                if time.monotonic() + _WAIT_S >= deadline:
                    raise
            time.sleep(_WAIT_S)

    def _once(self, method: str, path: str, **options: Any) -> httpx2.Response:
        try:
            answer = self._http.request(method, path, **options)
        except (httpx2.TransportError, httpx2.InvalidURL, OSError) as error:
            raise UnreachableError(self._silence(error)) from error
        self._refuse_unauthorised(answer.status_code)
        if 300 <= answer.status_code < 400:
            to = answer.headers.get("location", "elsewhere")
            text = f"sends its callers to {to}; give that address, if it is to get the token too"
            raise UnreachableError(f"{self.cluster.url}: {text}")
        return answer

    def _refuse_unauthorised(self, status: int) -> None:
        url = self.cluster.url
        if status == 401 or (status == 403 and not self.cluster.token):
            what = "refuses the request" if self.cluster.token else "wants a token, and none was found here"
            raise UnauthorisedError(f"{url}: {what} (HTTP {status}); {HOW_TO_GIVE_A_TOKEN}")
        if status == 403:
            text = f"refuses the token of {self.cluster.token_from} (HTTP 403): it is another cluster's, or was changed"
            raise UnauthorisedError(f"{url}: {text}; {HOW_TO_GIVE_A_TOKEN}")

    def _sound(self, answer: httpx2.Response, job_id: str | None = None) -> httpx2.Response:
        status = answer.status_code
        if status < 400:
            return answer
        if status == 404 and job_id is not None:
            raise NotFoundError(f"{self.cluster.url}: knows of no job {job_id}; `whisper-jobs list` shows those it has")
        said = last_line(answer.text)
        text = f"answers HTTP {status}{f' ({said})' if said else ''}"
        way_out = "ask again in a while, or look at dashboard.log on the head" if status >= 500 else "check the address"
        raise UnreachableError(f"{self.cluster.url}: {text}; {way_out}")

    def _json(self, answer: httpx2.Response) -> Any:
        try:
            return json.loads(answer.text)
        except ValueError:
            raise UnreachableError(
                f"{self.cluster.url}: what answers there is no Ray dashboard ({last_line(answer.text)[:80]!r}); "
                "check the address"
            ) from None

    def _silence(self, error: BaseException) -> str:
        url = self.cluster.url
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "CERTIFICATE" in reason.upper():
            way_out = "its certificate is not trusted here; set SSL_CERT_FILE to the file of its authority"
            return f"{url}: {way_out} ({reason})"
        if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout | TimeoutError):
            return f"{url}: takes connections but does not answer within {TIMEOUT_S:g} s; look at the head node"
        return f"{url}: no cluster answers there ({reason}); check --address, the network and whether the head runs"


def last_line(text: str) -> str:
    """The last line of an answer that says something: of a traceback, its error."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
