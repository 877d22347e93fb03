"""`verify`, `artifacts` and `pull`: commands about a complete run, wherever it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.artifacts import RunManifest, VerifyReport, read_manifest
from service.cli.options import output_options
from service.cli.output import print_artifacts, print_json, transfer_bar, warn
from service.errors import Fault, InputError, StorageError, VerificationError
from service.spec.counted import counted
from service.spec.paths import is_uri
from service.storage import Storage
from service.writing import writing

if TYPE_CHECKING:
    from service.pull import PullReport


@contextlib.contextmanager
def opened_root(root: str) -> Iterator[Storage]:
    """The root of a run; what cannot be read of it is the caller's error."""
    storage = Storage(root)
    storage.require_access()
    try:
        yield storage
    except StorageError as error:
        raise InputError(str(error)) from error


@click.command()
@click.argument("root")
@output_options
def verify(root: str, output: str) -> int:
    """Recheck every file of a complete run against its manifest.json: presence, size, SHA-256, and nothing unlisted.

    ROOT is a folder or a URI, such as s3://bucket/run.
    """
    from service.artifacts import verify as verify_run

    with opened_root(root) as storage:
        report = verify_run(storage)
    if output == "json":
        print_json(report.model_dump(mode="json"))
    elif report.problems:
        click.echo("\n".join(report.problems))
    else:
        click.echo(f"{report.root}: {_amount(report)}, all as published")
    return VerificationError.exit_code if report.problems else 0


@click.command()
@click.argument("root")
@output_options
def artifacts(root: str, output: str) -> int:
    """List what a complete run has made: each artifact's folder, size and WER, and which ones are refused."""
    from service.pull import artifacts_of

    with opened_root(root) as storage:
        found = artifacts_of(read_manifest(storage))
    if output == "json":
        print_json([one.model_dump(mode="json") for one in found])
    else:
        print_artifacts(found)
    return 0


@click.command()
@click.argument("root")
@click.argument("folder", metavar="DIR")
@click.option("--only", metavar="NAME", multiple=True, help="An artifact: adapter, hf, ggml, ...; may be repeated.")
@click.option("--refused", is_flag=True, help="Also artifacts that did not pass their proof.")
@output_options
def pull(root: str, folder: str, only: tuple[str, ...], refused: bool, output: str) -> int:
    """Bring the files of a complete run to DIR, and check each. The same command again goes on where it stopped."""
    from service.pull import pull as pull_run

    if is_uri(folder):
        raise InputError([Fault("DIR", "is a URI; give a folder on this machine", folder)])
    target = Path(folder).absolute()
    with (
        writing(target, "give another folder"),
        opened_root(root) as storage,
        transfer_bar("pulling") as progress,
    ):
        manifest: RunManifest = read_manifest(storage)
        report = pull_run(storage, manifest, target, only=only, refused=refused, progress=progress)
    warn(f"{name} is left out, it was refused: {reason} (--refused)" for name, reason in report.left_out.items())
    if output == "json":
        print_json(report.model_dump(mode="json"))
    else:
        new = f"{counted(report.downloaded, 'file was', 'files were')} not there yet"
        brought = new if report.downloaded else "all were there already"
        click.echo(f"{report.folder}: {_amount(report)}, all as published; {brought}")
    return 0


def _amount(report: VerifyReport | PullReport) -> str:
    return f"{counted(report.files, 'file')}, {counted(report.size_bytes, 'byte')}"
