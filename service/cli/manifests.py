"""`manifest build | check | stats`: the CSVs of a job. The work is done by the part that reads audio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from service.cli.options import is_debug, output_options, with_options
from service.spec.manifests import ALLOWED, AUTO, KINDS, LANGUAGE, SEED, VAL_RATIO, option
from service.spec.sections import DataConfig

Function = Callable[..., Any]


@click.group()
def manifest() -> None:
    """Make, check and describe the CSVs that a job is trained and scored on."""


def _limit(name: str, text: str) -> Callable[[Function], Function]:
    default = DataConfig.model_fields[name].default
    help_text = f"{text}, as data.{name}."
    return click.option(option(name), metavar="X", type=float, default=default, show_default=True, help=help_text)


_examining = with_options(
    click.option("--base-model", metavar="MODEL", help="Checkpoint whose tokenizer counts tokens."),
    click.option("--group", metavar="COLUMN", help="Column, such as speaker, that must not be on both sides."),
    click.option("--keep-duplicates", is_flag=True, help="Keep clips whose audio another clip has too."),
    _limit("min_duration_s", "Shortest clip in seconds"),
    _limit("silence_dbfs", "What counts as silent"),
    _limit("clipped_share", "What counts as clipped"),
    click.option(
        "--processes",
        metavar="N",
        type=click.IntRange(min=1),
        show_default="one per CPU",
        help="Processes that decode.",
    ),
)
"""Options of the commands that look at audio and text."""


_language = click.option(
    "--language", metavar="CODE", default=LANGUAGE, show_default=True, help="Language where none is named."
)


@manifest.command()
@click.argument("source")
@click.option("--out", metavar="DIR", required=True, help="Folder for train.csv, val.csv, rejects.csv, warnings.csv.")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default=AUTO,
    show_default=True,
    help=f"What SOURCE is; {AUTO}: told by what is there.",
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
@click.option(
    "--val-ratio",
    metavar="X",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=VAL_RATIO,
    show_default=True,
    help="Share of the clips that is held out.",
)
@click.option("--seed", metavar="N", type=int, default=SEED, show_default=True, help="Seed of the split.")
@click.option(
    "--allow-overlap",
    type=click.Choice(ALLOWED),
    multiple=True,
    show_default="none of them",
    help="What may be on both sides; may be repeated.",
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
    """Run the program with what the user has given; it has the same defaults."""
    from service.local import run_module

    arguments = ["manifest", *words]
    context = click.get_current_context()
    for name, value in given.items():
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or value is False:
            continue
        if value is True:
            arguments.append(option(name))
        else:
            arguments += [f"{option(name)}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return run_module(arguments, output=output, debug=is_debug(), goes_on=False)
