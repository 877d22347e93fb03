"""Calls to object storage: what passes by itself is tried again for some minutes, all else is one error at once."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from service.errors import StorageError

Result = TypeVar("Result")

PATIENCE_S = float(os.environ.get("WHISPER_JOBS_STORAGE_PATIENCE_S", "300"))
"""How long a store that fails or does not answer is asked again."""

START_PATIENCE_S = min(PATIENCE_S, 15.0)
"""The same where nothing has been done yet, and a wrong address is the likelier reason."""

TIMEOUT_S = float(os.environ.get("WHISPER_JOBS_STORAGE_TIMEOUT_S", "30"))
"""How long one call may be silent."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 15.0

_PASSING_CODES = {
    "InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "OperationAborted", "Throttling",
    "ConditionalRequestConflict", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "TooManyRequests",
}  # fmt: skip
_PASSING_CLASSES = {"HTTPClientError", "IncompleteRead", "IncompleteReadError", "ResponseParserError"}
"""Of botocore and urllib3: the connection or the answer was broken. aiohttp's ClientError is one more of them."""

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"}
_BAD_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "401",
}  # fmt: skip
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidSecurity", "403"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301", "Redirect"}

_VARIABLES = {
    "s3": ("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)", "AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "the project"),
}


class Caller:
    """Makes calls for one root.

    Args:
        uri: the root, named in errors.
        patience_s: how long what passes by itself is tried again; None: PATIENCE_S.
    """

    def __init__(self, uri: str, patience_s: float | None = None) -> None:
        self._uri, self._patience_s = uri, PATIENCE_S if patience_s is None else patience_s

    def __call__(self, action: str, call: Callable[[], Result]) -> Result:
        """Make a call until it succeeds.

        Args:
            action: what it does, as the store names it (PutObject).
            call: makes it, again and again.

        Raises:
            FileNotFoundError: there is no such object.
            FileExistsError: a condition of the call does not hold.
            StorageError: the store refuses it, or fails for too long.
        """
        deadline = time.monotonic() + self._patience_s
        wait = _FIRST_WAIT_S
        while True:
            try:
                return call()
            except Exception as error:  # told apart here, for every library behind fsspec
                if not passes(error):
                    raise self._meaning(action, error) from error
                if time.monotonic() + wait > deadline:
                    text = f"{self._uri}: object storage failed {action} for {self._patience_s:.0f} s"
                    raise StorageError(f"{text} ({_short(error)}); {self._way_out_of_silence()}") from error
            # Many clients that were thrown out together must not come back together.
            time.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def _meaning(self, action: str, error: Exception) -> Exception:
        code, status = code_of(error)
        if isinstance(error, StorageError):
            return error
        if code == "NoSuchBucket":
            _, endpoint = self._variables()
            return StorageError(f"{self._uri}: there is no such bucket; make it, or check the URI and {endpoint}")
        if status == 412 or isinstance(error, FileExistsError):
            return FileExistsError(str(error))
        if status == 404 or isinstance(error, FileNotFoundError):
            return FileNotFoundError(str(error))
        credentials, _ = self._variables()
        if any(type(one).__name__ in _NO_CREDENTIALS for one in causes(error)):
            return StorageError(f"{self._uri}: no credentials for it; set {credentials} in the environment")
        if code in _BAD_CREDENTIALS:
            return StorageError(f"{self._uri}: the credentials are refused ({code}); check {credentials}")
        if code in _DENIED or isinstance(error, PermissionError):
            text = f"{self._uri}: access is denied ({action}); the credentials of {credentials} must be allowed to "
            return StorageError(f"{text}list the bucket and to get, put and delete objects there")
        if code in _REGION:
            return StorageError(f"{self._uri}: the bucket is in another region ({code}); set AWS_REGION to it")
        return StorageError(f"{self._uri}: object storage refuses {action} ({code or _short(error)})")

    def _variables(self) -> tuple[str, str]:
        return _VARIABLES.get(self._uri.split("://")[0], ("the environment", "the address"))

    def _way_out_of_silence(self) -> str:
        _, endpoint = self._variables()
        return f"check {endpoint} and the network. The same command goes on"


def passes(error: BaseException) -> bool:
    """Whether an error may be gone when the call is made again."""
    code, status = code_of(error)
    if status is not None:
        return code in _PASSING_CODES or status == 429 or (status >= 500 and status != 501)
    for one in causes(error):
        names = {kind.__name__ for kind in type(one).__mro__}
        of_aiohttp = "ClientError" in names and type(one).__module__.startswith("aiohttp")
        if isinstance(one, ConnectionError | TimeoutError) or names & _PASSING_CLASSES or of_aiohttp:
            return True
    return False


def code_of(error: BaseException) -> tuple[str, int | None]:
    """The store's own code and the HTTP status behind an error; "" and None where no answer has come."""
    for one in causes(error):
        response: Any = getattr(one, "response", None)
        if isinstance(response, dict) and "Error" in response:
            code = str(response["Error"].get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return code, int(status if status is not None else code if code.isdigit() else 400)
        status = getattr(one, "code", None)  # of gcsfs; aiohttp has one too, for an answer that it cannot read
        if str(status).isdigit() and not type(one).__module__.startswith("aiohttp"):
            return str(status), int(str(status))
    return "", None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _short(error: BaseException) -> str:
    code, _ = code_of(error)
    return code or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
