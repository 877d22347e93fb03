"""`manifest build | check | stats`: the CSVs of a job. The work is done by the part that reads audio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from service.cli.options import is_debug, output_options, with_options

Function = Callable[..., Any]


@click.group()
def manifest() -> None:
    """Make, check and describe the CSVs that a job is trained and scored on."""


_examining = with_options(
    click.option("--base-model", metavar="MODEL", help="Checkpoint whose tokenizer counts tokens."),
    click.option("--group", metavar="COLUMN", help="Column, such as speaker, that must not be on both sides."),
    click.option("--keep-duplicates", is_flag=True, help="Keep clips whose audio another clip has too."),
    click.option("--min-duration-s", metavar="X", help="Shortest clip, as data.min_duration_s."),
    click.option("--silence-dbfs", metavar="X", help="What counts as silent, as data.silence_dbfs."),
    click.option("--clipped-share", metavar="X", help="What counts as clipped, as data.clipped_share."),
    click.option("--processes", metavar="N", help="Processes that decode: one per CPU, if not given."),
)
"""Options of the commands that look at audio and text."""


def _language(function: Function) -> Function:
    return click.option("--language", metavar="CODE", help="Language where none is named: English, if not given.")(
        function
    )


@manifest.command()
@click.argument("source")
@click.option("--out", metavar="DIR", required=True, help="Folder for train.csv, val.csv, rejects.csv, warnings.csv.")
@click.option(
    "--kind",
    metavar="KIND",
    help="names, sidecars, table, trans-txt or dataset; told by what is there, if not given.",
)
@click.option(
    "--pattern",
    metavar="REGEX",
    help="For names: regular expression over a file's name without its extension, with a group `text` and, optionally, "
    "`language`, `no_speech` and others, which become columns. As it is, it takes turn_it_on.wav, "
    "0001__turn_it_on.wav and 0001__en__turn_it_on.wav.",
)
@click.option("--path-column", metavar="NAME", help="For tables: column with the audio's path.")
@click.option("--text-column", metavar="NAME", help="For tables: column with the transcript.")
@click.option("--audio-root", metavar="DIR", help="For tables: where relative paths start, if not beside it.")
@click.option("--dataset-config", metavar="NAME", help="For datasets: name of the configuration.")
@click.option("--val-ratio", metavar="X", help="Share of the clips that is held out: a tenth, if not given.")
@click.option("--seed", metavar="N", help="Seed of the split.")
@click.option(
    "--allow-overlap",
    metavar="WHAT",
    multiple=True,
    help="transcript, audio or recording: what may be on both sides. Nothing may, if not given.",
)
@click.option("--overwrite", is_flag=True, help="Replace CSVs in --out that no build has written.")
@_language
@_examining
@output_options
def build(source: str, out: str, output: str, **given: Any) -> int:
    """Write train.csv and val.csv for SOURCE: a folder of audio, a table or a dataset.

    Transcripts are taken from file names; from files beside the audio (.txt, .json, .srt, .vtt); from a table (CSV,
    TSV, JSON lines); from LibriSpeech's .trans.txt; or from a dataset (hub id or folder).
    """
    return _pass_on(["build", source, "--out", out], given, output)


@manifest.command()
@click.argument("csv", nargs=-1, required=True)
@click.option("--rejects", metavar="FILE", help="CSV to write every fault to; the first hundred are printed.")
@_language
@_examining
@output_options
def check(csv: tuple[str, ...], output: str, **given: Any) -> int:
    """Look at every row of CSVs that were made elsewhere, and list all faults in one run."""
    return _pass_on(["check", *csv], given, output)


@manifest.command()
@click.argument("csv", nargs=-1, required=True)
@click.option("--speaker", metavar="COLUMN", help="Column that names the speaker.")
@_language
@output_options
def stats(csv: tuple[str, ...], output: str, **given: Any) -> int:
    """Hours, clips, lengths, languages, speakers and vocabulary of CSVs."""
    return _pass_on(["stats", *csv], given, output)


def _pass_on(words: list[str], given: dict[str, Any], output: str) -> int:
    from service.local import run_module

    arguments = ["manifest", *words]
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(option)
        elif value not in (None, False):
            arguments += [f"{option}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return run_module(arguments, output=output, debug=is_debug())
