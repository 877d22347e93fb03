"""Which cluster, and with which token: from the command line, the environment, or the file that Ray keeps."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from service.errors import Fault, InputError

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where the address is looked for, unlike Ray's own tools only if none is given: a word on the command line wins."""

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
DEFAULT_TOKEN_PATH = "~/.ray/auth_token"

HOW_TO_GIVE_A_TOKEN = f"set {TOKEN}, or {TOKEN_PATH} to a file that holds it (else {DEFAULT_TOKEN_PATH} is read)"


@dataclass(frozen=True)
class Cluster:
    """A cluster as this machine reaches it.

    Attributes:
        url: of its dashboard, without a slash at the end.
        token: sent with every request; None: none. Never shown.
        token_from: where it comes from, in words.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    token_from: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, so that nobody can listen in."""
        return (urlsplit(self.url).hostname or "") in ("localhost", "127.0.0.1", "::1")

    @property
    def sends_token_in_clear(self) -> bool:
        """Whether others on the way can read the token."""
        return bool(self.token) and not self.is_here and self.url.startswith("http://")


def find_cluster(address: str | None, environment: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster of an address, or of the environment, or of this machine.

    Raises:
        InputError: the address is none of a dashboard, or the token's file cannot be read.
    """
    where, value = "the default", DEFAULT_ADDRESS
    for name in reversed(ADDRESS_VARIABLES):
        given = environment.get(name, "").strip()
        # RAY_ADDRESS may be that of the cluster's own control service, which is no use from outside.
        if given and (name == ADDRESS_VARIABLES[0] or given.startswith(("http://", "https://"))):
            where, value = name, given
    if address:
        where, value = "--address", address
    token, token_from = find_token(environment)
    return Cluster(_dashboard(value.strip(), where), token, token_from)


def _dashboard(value: str, where: str) -> str:
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        sound = bool(parts.hostname) and parts.scheme in ("http", "https") and (parts.port or 1) > 0
    except ValueError:
        parts, sound = urlsplit(""), False
    sound = sound and value.isprintable() and " " not in value
    if parts.scheme == "ray":
        text = "is an address of Ray's client; give the dashboard's, such as http://HEAD:8265"
        raise InputError([Fault(where, text, value)])
    if parts.username or parts.password:
        raise InputError([Fault(where, f"holds a user or password; {HOW_TO_GIVE_A_TOKEN}")])
    if not sound or parts.query or parts.fragment:
        raise InputError([Fault(where, "is no address of a dashboard; give one such as http://HEAD:8265", value)])
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def find_token(environment: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """The token and where it comes from; None where there is none, or RAY_AUTH_MODE says that none is wanted.

    Raises:
        InputError: its file cannot be read, or what is there is no token.
    """
    if environment.get(MODE, "").strip().lower() == "disabled":
        return None, ""
    if token := environment.get(TOKEN, "").strip():
        return _sound(token, TOKEN), TOKEN
    named = environment.get(TOKEN_PATH, "").strip()
    path = Path(named or DEFAULT_TOKEN_PATH).expanduser()
    if not named and not path.is_file():
        return None, ""
    where = f"{TOKEN_PATH}={named}" if named else str(path)
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError([Fault(where, f"cannot be read ({reason}); {HOW_TO_GIVE_A_TOKEN}")]) from None
    if not token:
        raise InputError([Fault(where, f"is empty; {HOW_TO_GIVE_A_TOKEN}")])
    return _sound(token, where), where


def _sound(token: str, where: str) -> str:
    if any(not " " < character < "\x7f" for character in token):
        # The value itself is not shown: it may be a secret with a blank too many.
        raise InputError(
            [Fault(where, f"holds a token with a blank or another sign that no token has; {HOW_TO_GIVE_A_TOKEN}")]
        )
    return token


def tls_context() -> ssl.SSLContext:
    """Certificates are always verified: by the system's authorities, or those of SSL_CERT_FILE and SSL_CERT_DIR.

    Raises:
        InputError: what these name cannot be read.
    """
    file, folder = os.environ.get("SSL_CERT_FILE") or None, os.environ.get("SSL_CERT_DIR") or None
    try:
        return ssl.create_default_context(cafile=file, capath=folder)
    except (OSError, ssl.SSLError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        where = "SSL_CERT_FILE" if file else "SSL_CERT_DIR"
        text = f"cannot be read ({reason}); give the certificates of an authority in PEM form, or unset it"
        raise InputError([Fault(where, text, file or folder)]) from None
