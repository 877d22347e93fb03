"""Bringing what a spec names here to its storage: what `submit` and `k8s render` share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from service.cli.output import transfer_bar, warn
from service.errors import InputError
from service.spec.job import JobSpec

if TYPE_CHECKING:
    from service.upload import UploadPlan


def planned_uploads(spec: JobSpec, *, look: bool = True) -> UploadPlan:
    """What an upload would bring.

    Args:
        spec: the job, as it reads from this machine.
        look: whether the store must say what it has already; else it is asked if it answers.
    """
    from service.storage import Storage
    from service.upload import plan_uploads, uploads_uri

    uri = uploads_uri(spec)
    storage = Storage(uri)
    asked: Storage | None = storage
    try:
        storage.require_access(write=look)
    except InputError as error:
        if look:
            raise
        warn([f"what is there already is not known: {error}"])
        asked = None
    with transfer_bar("hashing") as progress:
        return plan_uploads(spec, uri, asked, progress)


def send_uploads(plan: UploadPlan) -> None:
    """Send what is missing, with a bar that shows how far it is."""
    from service.storage import Storage
    from service.upload import upload

    click.echo(f"uploading to {plan.uri}: {plan.words()}", err=True)
    if plan.new_files:
        with transfer_bar("uploading") as progress:
            upload(plan, Storage(plan.uri), progress)
