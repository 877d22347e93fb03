"""A Ray of the job's own on this machine: whether there is to be one, and who may join it."""

from __future__ import annotations

import os
import secrets

LOCAL = "local"


def is_local() -> bool:
    """Whether the job starts a Ray of its own: RAY_ADDRESS names no cluster."""
    return (os.environ.get("RAY_ADDRESS") or LOCAL) == LOCAL


def give_token() -> None:
    """Give a Ray of our own a token that nobody else knows, whatever token lies about.

    It listens on all of the machine's addresses, and who may join it may run code as us. To be called before Ray is
    imported, which reads this once.
    """
    if is_local():
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
