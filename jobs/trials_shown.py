"""A search as a person sees it while it runs: a table that changes on a terminal, a line for each news elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from service.spec.counted import counted
from service.spec.space import value_words, words_of
from service.trials import ENDED, score_text

_ROWS = 16
"""Trials in the table; of more than that, those under way and the best."""

_QUIET_S = 30.0
"""Where there is no terminal, seconds without a line after which it is told how far the search is."""

Event = dict[str, Any]


class TrialsShown:
    """Shows the events of a search's trials.

    Args:
        console: where to.
        say: prints a line.
        count: tells how many of how many are done, with the best score, and how much of all their work is.
    """

    def __init__(
        self, console: Console, say: Callable[[str], None], count: Callable[[int, int, str, float], None]
    ) -> None:
        self._console, self._say, self._count = console, say, count
        self._rows: dict[str, Event] = {}
        self._latest: Event = {}
        self._live: Live | None = None
        self._said = time.monotonic()

    def show(self, event: Event) -> None:
        """Show that a trial begins or ends, or was evaluated."""
        self._rows[event["id"]] = self._latest = event
        if not self._console.is_terminal:
            self._line(event)
            return
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=2)
            self._live.start()
        self._live.update(self.table())

    def advance(self, trial: str, share: float) -> None:
        """Show how much of its schedule a trial has done."""
        row = self._rows.get(trial)
        if row is None or row["status"] in ENDED:
            return
        self._rows[trial] = row | {"share": share}
        if self._live is not None:
            self._live.update(self.table())
        elif time.monotonic() - self._said >= _QUIET_S:
            self._tell_how_far()

    def close(self) -> None:
        """Leave the table as it stands."""
        if self._live is not None:
            self._live.stop()
        self._live = None

    def table(self) -> Table:
        """The trials under way and the best others."""
        last = self._latest
        rows = sorted(self._rows.values(), key=_order)
        names = list(dict.fromkeys(name for row in rows for name in row["settings"]))
        title = f"{last['done']} of {counted(last['planned'], 'trial')} done"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("trial", last["metric"].upper(), "done", *names, "status"):
            table.add_column(column, no_wrap=True)
        for row in rows[:_ROWS]:
            score = "" if row["score"] is None else score_text(row["score"], row["metric"])
            settings = [value_words(row["settings"][name]) if name in row["settings"] else "" for name in names]
            cells = [row["id"], score, f"{row['share']:.0%}", *settings, row["status"]]
            table.add_row(*map(Text, cells), style="bold" if row["id"] == last["best"] else "")
        if len(rows) > _ROWS:
            table.caption = f"and {len(rows) - _ROWS} more"
        return table

    def _line(self, event: Event) -> None:
        if event["status"] == "pending":
            self._tell(f"{event['id']} begins: {escape(words_of(event['settings']))}")
            return
        if event["status"] == "running" and event["score"] is None:
            return  # its training has begun; it was told of already
        score = "" if event["score"] is None else f"  {score_words(event['score'], event['metric'])}"
        how = {"running": f"at {event['share']:.0%}"}.get(event["status"], event["status"])
        cause = f" ({escape(event['cause'])})" if event["cause"] else ""
        self._tell(f"{event['id']} {how}{cause}{score}")
        if event["status"] in ENDED:
            self._tell_how_far()

    def _tell(self, line: str) -> None:
        self._said = time.monotonic()
        self._say(line)

    def _tell_how_far(self) -> None:
        self._said = time.monotonic()
        last, under_way = self._latest, [row for row in self._rows.values() if row["status"] == "running"]
        best = f"best {last['best']}: {score_words(last['best_score'], last['metric'])}" if last["best"] else ""
        # Those that are done are more than the rows where an earlier attempt has done some.
        work = last["done"] + sum(row["share"] for row in under_way)
        self._count(last["done"], last["planned"], best or f"{len(under_way)} under way", work)


def score_words(value: float, metric: str) -> str:
    """`WER 12.3%`, or `loss 0.123`."""
    return f"{'WER' if metric == 'wer' else 'loss'} {score_text(value, metric)}"


def _order(row: Event) -> tuple[bool, bool, float, str]:
    """Those under way first, then the best; what has failed last."""
    ended = row["status"] in ENDED
    return (ended, row["status"] == "failed", row["score"] if row["score"] is not None else float("inf"), row["id"])
