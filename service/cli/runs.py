"""`verify`: commands about the artifacts of a run."""

from __future__ import annotations

import click

from service.cli.options import output_options
from service.cli.output import print_json
from service.errors import VerificationError


@click.command()
@click.argument("root")
@output_options
def verify(root: str, output: str) -> int:
    """Recheck every file of a complete run against its manifest.json: presence, size, SHA-256, and nothing unlisted."""
    from service.artifacts import verify as verify_run
    from service.storage import Storage

    report = verify_run(Storage(root))
    if output == "json":
        print_json(report.model_dump(mode="json"))
    elif report.problems:
        click.echo("\n".join(report.problems))
    else:
        click.echo(f"{report.root}: {report.files} files, {report.size_bytes:,} bytes, all as published")
    return VerificationError.exit_code if report.problems else 0
