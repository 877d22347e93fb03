"""Joining a cluster, or starting a Ray on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import ray

from jobs.local_ray import LOCAL, is_local
from jobs.stopping import StopSignals
from service.errors import InfeasibleError

_ANSWER_S = 10.0


@contextlib.contextmanager
def connected(signals: StopSignals) -> Iterator[bool]:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start a local Ray until this ends.

    Before Ray is imported, `jobs.local_ray.give_token` makes the local one refuse everybody else.

    Args:
        signals: takes the signals back from Ray, which sets a handler that ends the process without a word.

    Yields:
        whether Ray is a local one of our own.
    """
    address, local = os.environ.get("RAY_ADDRESS") or LOCAL, is_local()
    if local:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    else:
        _require_answer(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise InfeasibleError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error
    signals.install()
    try:
        yield local
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try again for a quarter of an hour.

    Raises:
        InfeasibleError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except OSError as error:
        raise InfeasibleError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error
