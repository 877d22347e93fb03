"""Results on stdout, as text or JSON; warnings on stderr."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from service.artifacts import size_text
from service.spec.counted import counted
from service.spec.job import JobSpec

if TYPE_CHECKING:
    from rich.table import Table

    from service.memory import Memory
    from service.plan import Plan
    from service.pull import Artifact
    from service.storage import Progress


def print_json(content: Any) -> None:
    """A result as JSON."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


def warn(messages: Iterable[str]) -> None:
    """What the user should know, one line each."""
    for message in messages:
        click.echo(f"warning: {message}", err=True)


def spec_as_yaml(spec: JobSpec) -> str:
    """The complete spec in the form that people write."""
    import yaml

    return str(yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110))


def print_plan(plan: Plan) -> None:
    """A plan as text."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(_facts(plan))
    if plan.adapter:
        console.print()
        console.print(_adapters(plan))
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def print_artifacts(artifacts: Sequence[Artifact]) -> None:
    """The artifacts of a run as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("artifact", "folder", "files", "size", "WER", ""):
        table.add_column(title, justify="right" if title in ("files", "size", "WER") else "left", overflow="fold")
    for one in artifacts:
        wer = "" if one.wer is None else f"{one.wer:.1%}"
        refused = f"refused: {one.refused}" if one.refused else ""
        table.add_row(one.name, one.folder, str(one.files), size_text(one.size_bytes), wer, refused)
    Console(highlight=False, soft_wrap=True).print(table)


@contextlib.contextmanager
def transfer_bar(title: str) -> Iterator[Progress | None]:
    """A bar of bytes on a terminal; takes (done, in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _facts(plan: Plan) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 3, 0, 0))
    rows = ", ".join(f"{'?' if count is None else f'{count:,}'} {name}" for name, count in plan.rows.items())
    facts = [("job", plan.job_id), ("root", plan.root), ("clips", rows)]
    if search := plan.search:
        points = "a space with ranges" if search.points is None else counted(search.points, "point")
        seeds = f", {search.repeats} seeds each" if search.repeats > 1 else ""
        facts.append(
            ("search", f"{counted(search.trials, 'trial')} of {points} by {search.sampler}, {search.scheduler}{seeds}")
        )
        if search.trial_bytes:
            size = size_text(search.trial_bytes)
            facts.append(("storage (estimate)", f"{size} for each trial under way and each of the top_k, at most"))
    if schedule := plan.schedule:
        facts += [
            ("effective batch", counted(schedule.effective_batch, "clip")),
            (
                "steps",
                f"{schedule.total_steps:,} ({schedule.steps_per_epoch:,} per epoch), {schedule.warmup_steps:,} warm-up",
            ),
            ("evaluations", f"{schedule.evaluations:,}, and the base model before"),
            ("checkpoints", f"{schedule.checkpoints:,}"),
        ]
    if plan.memory:
        facts += _memory_facts(plan.memory)
    for name, value in facts:
        table.add_row(name, value)
    return table


def _memory_facts(memory: Memory) -> list[tuple[str, str]]:
    training, evaluation, host = memory.training, memory.evaluation, memory.host
    together = f" of {memory.trials} trials together" if memory.trials else ""
    clips = counted(memory.clips, "clip")
    parts = [f"base {_gigabytes(training.base)}", f"adapter and optimizer {_gigabytes(training.adapter)}"]
    parts.append(f"activations of {clips} {_gigabytes(training.activations)}")
    if training.loss:
        parts.append(f"loss {_gigabytes(training.loss)}")
    if training.kept:
        parts.append(f"kept encoder outputs {_gigabytes(training.kept)}")
    facts = [
        ("memory (estimate)", f"{_gigabytes(training.total)} in training{together} ({', '.join(parts)})"),
        ("", f"{_gigabytes(evaluation.total)} in evaluation, per worker"),
    ]
    kept = {"decoded clips": host.audio, "encoder outputs": host.outputs}
    if host.total:
        found = ", ".join(f"{name} {_gigabytes(size)}" for name, size in kept.items() if size)
        facts.append(("", f"{_gigabytes(host.total)} of main memory, at most, for what is kept ({found}), per worker"))
    return facts


def _adapters(plan: Plan) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("adapted", box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    table.add_column("modules", justify="right")
    table.add_column("trainable parameters", justify="right")
    adapter = plan.adapter
    if adapter is None:
        return table
    for part, counts in adapter.parts.items():
        table.add_row(part, f"{counts['modules']:,}", f"{counts['parameters']:,}")
    for name, parameters in adapter.saved.items():
        table.add_row(f"{name} (in full)", "1", f"{parameters:,}")
    share = f"{adapter.trainable_parameters:,} = {adapter.share:.2%} of {adapter.base_parameters:,}"
    table.columns[0].footer, table.columns[1].footer = "all", f"{adapter.modules + len(adapter.saved):,}"
    table.columns[2].footer = share
    return table


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
