"""`report` and `compare`: runs for their readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from service.artifacts import REPORT, size_text
from service.cli.options import output_options
from service.cli.output import print_json
from service.cli.runs import opened_root
from service.errors import InputError
from service.writing import writing

if TYPE_CHECKING:
    from rich.console import Console

    from service.report.compare import Comparison, Pair, Row


@click.command()
@click.argument("root")
@click.option("--out", metavar="FILE", default=REPORT, show_default=True, help="Where the page goes.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@output_options
def report(root: str, out: str, show: bool, output: str) -> int:
    """Make the report of a run as one HTML file, which needs no network: its verdict, curves, errors and settings.

    ROOT is a folder or a URI, such as s3://bucket/run. A job leaves the same page as report.html in its root. Here it
    is made anew, also of a run that is still at work. Nothing in ROOT is changed.
    """
    from service.report.page import report_page

    target = Path(out).absolute()
    _require_outside(target, root)
    with opened_root(root) as storage:
        page = report_page(storage)
    size = _write(target, page)
    if show:
        click.launch(target.as_uri())
    if output == "json":
        print_json({"root": root, "report": str(target), "size_bytes": size})
    else:
        click.echo(f"{target}  ({size_text(size)})")
    return 0


@click.command()
@click.argument("roots", nargs=-1, required=True, metavar="ROOT ROOT...")
@click.option("--html", "page", metavar="FILE", help="Also as a page, with every utterance of both side by side.")
@output_options
def compare(roots: tuple[str, ...], page: str | None, output: str) -> int:
    """Compare runs: settings that differ, figures side by side, and utterances that got better or worse.

    Utterances of the first ROOT are compared with those of each other one, where both were scored on the same clip. The
    interval of the difference comes from a paired bootstrap: clips are drawn with replacement, the same for both.
    """
    from service.report.compare import as_dict, compare_page
    from service.report.compare import compare as compare_runs
    from service.report.run import read_run

    if len(roots) < 2:
        raise click.UsageError("give two roots or more")
    runs = []
    for root in roots:
        with opened_root(root) as storage:
            runs.append(read_run(storage))
    found = compare_runs(runs)
    target = Path(page).absolute() if page else None
    if target:
        for root in roots:
            _require_outside(target, root)
        _write(target, compare_page(found))
    if output == "json":
        print_json(as_dict(found) | ({"page": str(target)} if target else {}))
    else:
        _print(found)
        if target:
            click.echo(f"\n{target}")
    return 0


def _require_outside(target: Path, root: str) -> None:
    """Refuse to write into a run's root, whose manifest.json has the hash of every file."""
    if "://" not in root and target.resolve().is_relative_to(Path(root).resolve()):
        raise InputError(f"{target}: lies in the run's root, where nothing is changed; give another file with --out")


def _write(target: Path, page: str) -> int:
    content = page.encode("utf-8")
    with writing(target, "give another file"):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return len(content)


def _print(found: Comparison) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    _print_rows(console, "", found.names, found.metrics)
    if found.settings:
        _print_rows(console, "settings that differ", found.names, found.settings)
    else:
        console.print("\nNo settings differ, but for names and places.")
    for note in found.notes:
        console.print(f"\nnote: {_safe(note)}")
    for pair in found.pairs:
        _print_pair(console, found, pair)


def _print_rows(console: Console, title: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", *names):
        table.add_column(Text(_safe(name)), overflow="fold")
    for row in rows:
        cells = [Text(_safe(text), style="bold" if index == row.best else "") for index, text in enumerate(row.texts)]
        table.add_row(Text(_safe(row.label)), *cells)
    console.print(table)


def _print_pair(console: Console, found: Comparison, pair: Pair) -> None:
    from service.report.compare import SHOWN_IN_TEXT, said

    first, other = found.names[0], found.names[pair.other]
    console.print(f"\n{_safe(first)} -> {_safe(other)}", style="bold")
    console.print(said(pair))
    width = max(len(first), len(other), len("said"))
    for title, changed in zip(("got worse", "got better"), pair.changed(), strict=True):
        for number, (old, new) in enumerate(changed[:SHOWN_IN_TEXT]):
            if number == 0:
                more = f", the first {SHOWN_IN_TEXT}" if len(changed) > SHOWN_IN_TEXT else ""
                console.print(f"\n{title}: {len(changed):,}{more}")
            console.print(
                f"\n  {_safe(new.path.rsplit('/', 1)[-1])}  errors {old.errors} -> {new.errors} of {new.words}"
            )
            for name, text in (("said", new.reference), (first, old.hypothesis), (other, new.hypothesis)):
                console.print(f"    {_safe(name):<{width}}  {_safe(text)}")


def _safe(text: str) -> str:
    """Strangers' words, as a terminal shows and does not obey them; the console reads no markup."""
    from service.report.words import printable

    return printable(text)
