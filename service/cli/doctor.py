"""`doctor`: everything that a job needs, from this machine to the cluster's storage, one line each."""

from __future__ import annotations

import click

from service.cli.cluster import address_word, keep_address, opened
from service.cli.options import SpecCommand, SpecInput, checked_spec_options, output_options
from service.cli.output import print_json, warn
from service.errors import EXIT_DONE


@click.command(cls=SpecCommand)
@click.argument("spec", required=False)
@checked_spec_options
@address_word
@output_options
def doctor(spec_input: SpecInput, address: str | None, output: str) -> int:
    """Look at all that a job needs: this machine, the cluster and, with SPEC, its resources, storage and files.

    The exit code is 0 where all is well, else that of the first fault.
    """
    from service.client.doctor import examine

    keep_address(address)
    loaded = spec_input.load(check_files=False) if spec_input.source or spec_input.overrides else None
    if loaded:
        warn(loaded.warnings)
    findings = []
    for finding in examine(opened(address), loaded.spec if loaded else None):
        findings.append(finding)
        if output != "json":
            click.echo(f"{'ok  ' if finding.code == EXIT_DONE else 'FAIL'}  {finding.what:<10} {finding.text}")
    if output == "json":
        print_json([vars(finding) for finding in findings])
    return next((finding.code for finding in findings if finding.code), EXIT_DONE)
