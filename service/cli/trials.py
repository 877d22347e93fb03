"""`trials`: the table of a search, while it runs and after."""

from __future__ import annotations

import click

from service.cli.cluster import print_rows
from service.cli.options import output_options
from service.cli.output import print_json
from service.cli.runs import opened_root
from service.spec.space import value_words
from service.trials import DEFAULTS, ENDED, Search, Trial, read_search, score_text

_WIDTH = 160


@click.command()
@click.argument("root")
@output_options
def trials(root: str, output: str) -> int:
    """Show the trials of a search, the best first: their settings, scores, and how each has ended.

    ROOT is the search's folder or URI; the search may be under way.
    """
    with opened_root(root) as storage:
        search = read_search(storage)
    if output == "json":
        print_json(search.model_dump(mode="json"))
    else:
        _print(search)
    return 0


def _print(search: Search) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for trial in search.trials for name in trial.settings))
    shown = [name for name in names if any(trial.settings.get(name) is not None for trial in search.trials)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("trial", search.metric.upper(), "done", *shown, "parameters", "time", "status"):
        right = title in (search.metric.upper(), "done", "parameters", "time")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for trial in sorted(search.trials, key=_order):
        cells = [_name(trial), _score(search, trial.score), _share(trial)]
        cells += [value_words(trial.settings[name]) if name in trial.settings else "" for name in shown]
        cells += ["" if trial.trainable_parameters is None else f"{trial.trainable_parameters:,}"]
        cells += [f"{trial.seconds:,.0f} s" if trial.seconds else "", _status(trial)]
        style = "bold" if trial.id == search.winner else "red" if trial.status == "failed" else ""
        table.add_row(*(Text(cell) for cell in cells), style=style)
    # A table that is cut or broken to the terminal's width cannot be read; one that is too wide can be scrolled.
    Console(highlight=False, soft_wrap=True, width=_WIDTH).print(table)
    running = sum(trial.status == "running" for trial in search.trials)
    done = sum(trial.status in ENDED for trial in search.trials[1:])
    facts = [("trials", f"{done} of {search.planned} done" + (f", {running} running" if running else ""))]
    facts += [("verdict", search.verdict)] if search.verdict else []
    shares = ", ".join(f"{name} {share:.0%}" for name, share in search.importance.items())
    facts += [("importance", shares)] if shares else []
    facts += [("time", f"{search.seconds:,.0f} s, {search.gpu_hours:.2f} GPU-hours")]
    print_rows("", facts)


def _order(trial: Trial) -> tuple[bool, float, str]:
    return (trial.score is None or trial.status == "failed", trial.score or 0.0, trial.id)


def _name(trial: Trial) -> str:
    return f"{trial.id} ({DEFAULTS})" if trial.origin == DEFAULTS else trial.id


def _score(search: Search, value: float | None) -> str:
    return "" if value is None else score_text(value, search.metric)


def _share(trial: Trial) -> str:
    return f"{trial.step / trial.steps:.0%}" if trial.step and trial.steps else ""


def _status(trial: Trial) -> str:
    return f"{trial.status}: {trial.cause}" if trial.cause else trial.status
