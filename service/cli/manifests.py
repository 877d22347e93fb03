"""`manifest build`: the CSVs of a job, made from file names. The work is done by the part that reads audio."""

from __future__ import annotations

import click

from service.cli.options import is_debug, output_options


@click.group()
def manifest() -> None:
    """Make the CSVs that a job is trained and scored on."""


@manifest.command()
@click.argument("audio_dir")
@click.option("--out", metavar="DIR", required=True, help="Folder for train.csv, val.csv and rejects.csv.")
@click.option(
    "--pattern",
    metavar="REGEX",
    help="Regular expression over a file's name without its extension, with a group `text` and, optionally, "
    "`language`. As it is, it takes turn_it_on.wav, 0001__turn_it_on.wav and 0001__en__turn_it_on.wav.",
)
@click.option("--val-ratio", metavar="X", help="Share of the sentences that is held out: a tenth, if not given.")
@click.option("--seed", metavar="N", help="Seed of the split.")
@click.option("--language", metavar="CODE", help="Language of files whose name gives none: English, if not given.")
@output_options
def build(audio_dir: str, out: str, output: str, **given: str | None) -> int:
    """Write train.csv and val.csv for the audio below AUDIO_DIR, with its transcripts taken from the file names."""
    from service.local import run_module

    arguments = ["manifest", "build", audio_dir, "--out", out]
    for name, value in given.items():
        if value is not None:
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return run_module(arguments, output=output, debug=is_debug())
