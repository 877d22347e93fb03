"""What a person sees while a job runs, on stderr: a live bar on a terminal, a line now and then elsewhere.

The client of a cluster reads these lines in the job's log (service/client/progress.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jobs.trials_shown import TrialsShown
from service.spec.counted import counted

_LINE_EVERY_S = 10.0


_LEAST_SHARE = 0.01
"""Of all work, what must be done for a guess at when the rest will be."""

LEVELS = {"warning": "[yellow]warning[/yellow]: ", "refused": "[red]refused[/red]: "}
"""How a notice begins on the screen, by its `level`; its text is plain."""

LARGE = 32 << 20
"""Bytes of a transfer that is worth a bar."""


def transfer_events(emit: Callable[[dict[str, Any]], None]) -> Callable[[int, int], None]:
    """Storage's progress as events, of large transfers."""

    def tell(done: int, total: int) -> None:
        if total >= LARGE:
            emit({"event": "uploaded", "done": done, "total": total})

    return tell


def seconds_text(seconds: float) -> str:
    """`0:07`, `12:30` or `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Reporter:
    """Shows a job's events.

    Args:
        console: where to; stderr by default.
        every_s: where there is no terminal, seconds between two lines that tell how far something is.
    """

    def __init__(self, console: Console | None = None, every_s: float = _LINE_EVERY_S) -> None:
        self._every_s = every_s
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started = time.monotonic()
        self._last_line = self._started
        self._first: tuple[int, float] | None = None
        self._trials = TrialsShown(self._console, self._say, functools.partial(self._count, "trials"))
        self._handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "stage": self._stage,
            "rows": self._rows,
            "model": self._model,
            "step": self._step,
            "transcribed": self._transcribed,
            "evaluation": self._evaluation,
            "uploaded": self._uploaded,
            "trial": self._trial,
            "trial_step": lambda event: self._trials.advance(event["id"], event["share"]),
            "root": lambda event: self._say(f"[bold]{event['job_id']}[/bold]  -> {escape(event['root'])}"),
            "notice": self._notice,
        }

    def show(self, event: dict[str, Any]) -> None:
        """Show one event; kinds that say nothing to a person are passed over."""
        if "trial" in event:  # of a trial's own training: the search tells of it
            return
        if handler := self._handlers.get(event["event"]):
            handler(event)

    def files(self, done: int, total: int) -> None:
        """Show how many files have been looked at."""
        self._advance("files", done, total)

    def close(self) -> None:
        """Take the live bar off the screen, and leave a search's table as it stands."""
        self._trials.close()
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _say(self, text: str) -> None:
        elapsed = seconds_text(time.monotonic() - self._started)
        self._console.print(f"[dim]{elapsed:>7}[/dim]  {text}")

    def _advance(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if self._console.is_terminal:
            if self._bar is None:
                self._bar = Progress(
                    TextColumn("         {task.description}"),
                    BarColumn(bar_width=24),
                    TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                    TextColumn("{task.fields[detail]}"),
                    TimeElapsedColumn(),
                    TextColumn("eta"),
                    TimeRemainingColumn(),
                    console=self._console,
                    transient=True,
                )
                self._bar.start()
            if self._task is None or self._bar.tasks[-1].description != stage:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(stage, total=total, detail=detail)
            self._bar.update(self._task, completed=done, total=total, detail=detail)
            return
        now = time.monotonic()
        if self._first is None or done < self._first[0]:
            self._first = (done, now)
        if done < total and now - self._last_line < self._every_s:
            return
        self._count(stage, done, total, detail)

    def _count(self, stage: str, done: int, total: int, detail: str, work: float | None = None) -> None:
        """`work`: how much of the total is done, where that is more than `done`."""
        now = self._last_line = time.monotonic()
        self._first = self._first or (0, self._started)
        first_done, first_time = self._first
        work = done if work is None else work
        left = ""
        if work - first_done >= _LEAST_SHARE * (total - first_done) and done < total:
            left = f"  eta {seconds_text((now - first_time) / (work - first_done) * (total - work))}"
        self._say(f"{stage} {done}/{total}{'  ' + detail if detail else ''}{left}")
        if done == total:
            self._first = None

    def _stage(self, event: dict[str, Any]) -> None:
        self.close()
        self._first, self._last_line = None, time.monotonic()
        if event["status"] == "skipped":
            self._say(f"[bold]{event['stage']}[/bold]  done before")
        elif event["status"] == "started":
            self._say(f"[bold]{event['stage']}[/bold]  {escape(event['text'])}")

    def _notice(self, event: dict[str, Any]) -> None:
        self._say(LEVELS.get(event.get("level", ""), "") + escape(event["text"]))

    def _rows(self, event: dict[str, Any]) -> None:
        if self._console.is_terminal is False and time.monotonic() - self._last_line < self._every_s:
            return
        self._last_line = time.monotonic()
        self._say(f"{event['split']}: {counted(event['rows'], 'row')} checked")

    def _model(self, event: dict[str, Any]) -> None:
        share = event["trainable_parameters"] / event["parameters"]
        self._say(
            f"{counted(event['modules'], 'module')} adapted; "
            f"{event['trainable_parameters']:,} of {event['parameters']:,} parameters "
            f"are trained ({share:.2%}); {_precision(event['precision'])} on {event['device']}"
        )
        if event["resumed_from_step"]:
            self._say(f"going on from step {event['resumed_from_step']} of {event['steps']}")

    def _step(self, event: dict[str, Any]) -> None:
        detail = f"loss {event['loss']:.3f}  lr {event['lr']:.1e}"
        self._advance("step", event["step"], event["steps"], detail)

    def _transcribed(self, event: dict[str, Any]) -> None:
        self._advance(f"transcribing ({event['what']})", event["done"], event["total"])

    def _uploaded(self, event: dict[str, Any]) -> None:
        self._advance("uploading, MB", round(event["done"] / 1e6), round(event["total"] / 1e6))

    def _evaluation(self, event: dict[str, Any]) -> None:
        where = f" at step {event['step']}" if "step" in event else ""
        if "loss" in event:
            self._say(f"validation loss {event['loss']:.3f}{where}")
            return
        name = f"{event['what']} " if "what" in event else ""
        self._say(f"{name}WER {event['wer']:.1%}, CER {event['cer']:.1%}{where}")

    def _trial(self, event: dict[str, Any]) -> None:
        self._first = self._first or (event["done"], time.monotonic())
        self._trials.show(event)


def _precision(name: str) -> str:
    return {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
