"""The result of a job in words, on stdout, once it is done."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.export.table import HEADER, export_rows
from jobs.guard.words import summary_fact
from jobs.progress import seconds_text
from service import artifacts
from service.report.paired import in_words
from service.spec.counted import counted
from service.spec.export import HF
from service.storage import Storage

_PROGRAM = "whisper-jobs"

_EXPORTS_WIDTH = 110
"""Columns of the exports' table, also where the terminal has fewer: numbers that are cut say nothing."""


def print_summary(root: Storage, metrics: dict[str, Any]) -> None:
    """Print a finished run: rates before and after, what was proven, and where everything lies."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{metrics['job_id']}[/bold]  {_verdict(metrics)}\n")
    console.print(_rates(metrics))
    exported = metrics.get("artifacts", {})
    if any("runtime" in entry for entry in exported.values()):
        console.print()
        Console(highlight=False, width=max(console.width, _EXPORTS_WIDTH)).print(_exports(exported))
    console.print()
    for label, text in _facts(root, metrics):
        console.print(f"  {label:<10} {escape(text)}")
    console.print(f"\n  Check it at any time: {escape(_command('verify', root))}")


def _command(name: str, root: Storage) -> str:
    """A command on a root, as it works in the shell in which the job was started.

    `make demo` installs whisper-jobs into an environment that is not activated: it is not on PATH then, and named by
    the place where it is.
    """
    program = Path(sys.executable).with_name(_PROGRAM)
    if shutil.which(_PROGRAM) or not program.exists():
        return shlex.join([_PROGRAM, name, root.path()])
    here = Path.cwd()
    shown = program.relative_to(here) if program.is_relative_to(here) else program
    return shlex.join([str(shown), name, root.path()])


def _verdict(metrics: dict[str, Any]) -> str:
    if "tuned" not in metrics:
        model = metrics["model"]
        return f"WER {model['wer']:.1%} on {counted(model['utterances'], 'clip')}"
    base, tuned = metrics["base"]["wer"], metrics["tuned"]["wer"]
    if metrics["promoted"]:
        found = metrics.get("difference")
        return f"[green]better[/green]: WER {base:.1%} -> {tuned:.1%}" + (f", {in_words(found)}" if found else "")
    return f"[red]not promoted[/red]: {'; '.join(metrics['promotion_reasons'])}"


def _rates(metrics: dict[str, Any]) -> Table:
    columns: list[tuple[str, Any]] = [(name, metrics[name]) for name in ("base", "tuned", "model") if name in metrics]
    if merged := metrics.get("artifacts", {}).get("hf"):
        columns.append(("merged", merged))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 2))
    table.add_column("")
    for name, _ in columns:
        table.add_column(name, justify="right")
    for label, key in (("WER", "wer"), ("CER", "cer"), ("WER raw", "wer_raw"), ("CER raw", "cer_raw")):
        table.add_row(label, *(_percent(values.get(key)) for _, values in columns))
    table.add_row("95 % of WER", *(_interval(values.get("wer_interval")) for _, values in columns))
    for key, label in (("substitutions", "substituted"), ("deletions", "deleted"), ("insertions", "inserted")):
        table.add_row(label, *(_count(values.get(key)) for _, values in columns))
    languages = sorted({code for _, values in columns for code in values.get("languages", {})})
    if len(languages) > 1:
        for code in languages:
            found = [values.get("languages", {}).get(code) for _, values in columns]
            table.add_row(f"WER {code}", *(_percent(value["wer"] if value else None) for value in found))
    table.add_row("clips", *(_count(values.get("utterances")) for _, values in columns))
    return table


def _exports(entries: dict[str, dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, label in enumerate(HEADER):
        table.add_column(label, justify="left" if index < 3 else "right", no_wrap=True)
    for row in export_rows(entries):
        table.add_row(*map(escape, row), style="red" if row[-1] else "")
    return table


def _facts(root: Storage, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if adapter := metrics.get("adapter"):
        facts.append(("adapter", f"{root.path(artifacts.ADAPTER)}  (all {adapter['modules']} adapted modules changed)"))
    if merge := metrics.get("merge"):
        merged = metrics["artifacts"]["hf"]
        proof = f"{merged['identical']:.1%} of the transcripts identical"
        if metrics.get("source", {}).get("adapter", True):
            logits = f"logits within {merge['max_logit_difference']:.0e} of the adapter's"
            proof = f"{logits}; PEFT's own weights to the last bit; {proof}"
        facts.append(("merged", f"{root.path(artifacts.MERGED)}  ({proof})"))
    if exported := [name for name in metrics.get("artifacts", {}) if name != HF]:
        facts.append(("exports", f"{root.path(artifacts.EXPORTS)}  ({', '.join(exported)})"))
    for name, entry in metrics.get("artifacts", {}).items():
        if "refused" in entry:
            facts.append(("refused", f"{name}: {entry['refused']}"))
    if guarded := metrics.get("guard"):
        facts.append(("guard", summary_fact(guarded)))
    if search := metrics.get("search"):
        facts.append(("search", search["verdict"]))
        facts.append(("trials", _command("trials", root)))
    if root.exists(artifacts.REPORT):
        facts.append(("report", f"{root.path(artifacts.REPORT)}  (for a browser)"))
    facts.append(("results", root.path(artifacts.METRICS)))
    facts.append(("utterances", root.path(artifacts.EVALUATION)))
    if seconds := metrics.get("seconds"):
        spent = ", ".join(f"{stage} {seconds_text(value)}" for stage, value in seconds.items() if stage != "total")
        facts.append(("time", f"{seconds_text(seconds['total'])}  ({spent})"))
    return facts


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _interval(value: list[float] | None) -> str:
    return "" if value is None else f"{value[0]:.1%} to {value[1]:.1%}"
