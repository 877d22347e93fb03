"""The tables of the page, each as rows of texts that are ready to be shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service.artifacts import size_text
from service.report import words
from service.report.run import Rejects, Run
from service.report.search_figures import is_real, score_text, searched, short
from service.spec.export import HF
from service.spec.job import JobSpec, leaves, same_value
from service.trials import Search, Trial


@dataclass(frozen=True)
class Cell:
    """A cell: its text, what it is sorted by, and how it is marked."""

    text: str
    key: float | str = ""
    mark: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: titles of the columns.
        rows: as many cells each.
        marks: of each row, for its look: `winner`, `base`; "" for none.
        ids: of each row, for the page's script.
    """

    head: list[str]
    rows: list[list[Cell]]
    marks: list[str]
    ids: list[str]

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return [any(row[index].is_number for row in self.rows) for index in range(len(self.head))]


def make_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], marks: Sequence[str] = ()) -> Table:
    """A table without the columns in which no row has anything."""
    found = [list(row) for row in rows]
    kept = [
        index
        for index in range(len(head))
        if index == 0 or any(row[index].text not in ("", words.NONE) for row in found)
    ]
    return Table(
        head=[head[index] for index in kept],
        rows=[[row[index] for index in kept] for row in found],
        marks=list(marks) or [""] * len(found),
        ids=[""] * len(found),
    )


def text(value: Any, mark: str = "") -> Cell:
    """A cell of words."""
    shown = "" if value is None else str(value)
    return Cell(shown, shown.lower(), mark)


def number(value: float | None, shown: str, mark: str = "") -> Cell:
    """A cell of a number; one that is not there is sorted last."""
    return Cell(shown, value if value is not None else float("inf"), mark, is_number=True)


def rate(value: float | None, mark: str = "", digits: int = 1) -> Cell:
    """A cell of an error rate or share."""
    return number(value, words.percent(value, digits), mark)


def rates(run: Run) -> Table:
    """Error rates of the base model and the result, in total."""
    sides = [name for name in ("base", "tuned", "model") if name in run.metrics]
    rows = []
    for label, key in (("WER", "wer"), ("CER", "cer"), ("WER, raw text", "wer_raw"), ("CER, raw text", "cer_raw")):
        rows.append([text(label), *(rate(run.metrics[side].get(key), digits=2) for side in sides)])
    for label, key in (
        ("substituted words", "substitutions"),
        ("deleted words", "deletions"),
        ("inserted words", "insertions"),
        ("words", "words"),
        ("clips", "utterances"),
    ):
        rows.append(
            [
                text(label),
                *(number(run.metrics[side].get(key), words.count(run.metrics[side].get(key))) for side in sides),
            ]
        )
    return make_table(["", *sides], [row for row in rows if any(cell.text not in ("", words.NONE) for cell in row[1:])])


def languages(run: Run) -> Table | None:
    """Error rates by language, where there are several."""
    sides = [name for name in ("base", "tuned", "model") if name in run.metrics]
    codes = sorted({code for side in sides for code in run.metrics[side].get("languages", {})})
    if len(codes) < 2:
        return None
    rows = []
    for code in codes:
        found = [run.metrics[side].get("languages", {}).get(code, {}) for side in sides]
        last = found[-1]
        row = [text(words.language(code)), number(last.get("utterances"), words.count(last.get("utterances")))]
        row += [rate(one.get("wer")) for one in found]
        if len(found) > 1 and None not in (change := [one.get("wer") for one in found]):
            difference = change[-1] - change[0]
            mark = "good" if difference < 0 else "bad" if difference > 0 else ""
            row.append(number(difference, words.points(difference), mark))
        elif len(found) > 1:
            row.append(number(None, words.NONE))
        row.append(rate(last.get("cer")))
        rows.append(row)
    change_head = ["change, points"] if len(sides) > 1 else []
    return make_table(["language", "clips", *(f"WER {side}" for side in sides), *change_head, "CER"], rows)


def exports(run: Run) -> Table | None:
    """Every artifact with the proof of it."""
    entries: dict[str, dict[str, Any]] = run.metrics.get("artifacts", {})
    if not entries:
        return None
    head = ["artifact", "runtime", "computed in", "size", "WER", "compared", "same text", "WER by default", "RTF"]
    rows = []
    for name, entry in entries.items():
        runtime = entry.get("version") or entry.get("runtime", "transformers" if name == HF else "")
        size, rtf = entry.get("size_bytes"), entry.get("rtf")
        rows.append(
            [
                text(name),
                text(runtime),
                text(entry.get("compute_type")),
                number(size, size_text(size) if size is not None else words.NONE),
                rate(entry.get("wer")),
                rate(entry.get("wer_compared")),
                rate(entry.get("identical")),
                rate(entry.get("wer_default")),
                number(rtf, f"{rtf:.3f}" if rtf is not None else words.NONE),
                text(
                    f"refused: {entry['refused']}" if "refused" in entry else "passed",
                    "bad" if "refused" in entry else "good",
                ),
            ]
        )
    marks = ["refused" if "refused" in entry else "" for entry in entries.values()]
    return make_table([*head, "proof"], rows, marks)


def data_splits(run: Run) -> Table | None:
    """What was trained on and scored on."""
    splits = {name: found for name, found in run.data.items() if isinstance(found, dict) and "rows" in found}
    if not splits:
        return None
    rows = []
    for name, split in splits.items():
        said = []
        for code, clips in split.get("languages", {}).items():
            spoken = split.get("language_hours", {}).get(code)
            amount = words.counted(clips, "clip") + (f", {words.hours(spoken)}" if spoken is not None else "")
            said.append(f"{words.language(code)} ({amount})")
        mean = 3600 * split["hours"] / split["rows"] if split["rows"] and "hours" in split else None
        rows.append(
            [
                text({"train": "training", "val": "validation"}.get(name, name)),
                number(split["rows"], words.count(split["rows"])),
                number(split.get("hours"), words.hours(split.get("hours"))),
                number(mean, words.NONE if mean is None else f"{mean:.1f} s"),
                text(", ".join(said)),
                number(
                    split.get("rejected"), words.count(split.get("rejected")), "bad" if split.get("rejected") else ""
                ),
                text(str(split.get("sha256", ""))[:16]),
            ]
        )
    return make_table(["split", "clips", "audio", "mean length", "languages", "left out", "SHA-256"], rows)


def reject_reasons(run: Run) -> Table | None:
    """How many rows were left out of each split, by the reason; with the first example of each."""
    counts: Counter[tuple[str, str]] = Counter(run.rejects.counts) if run.rejects else Counter()
    if not counts:
        for name, split in run.data.items():
            if isinstance(split, dict):
                counts.update({(name, kind): found for kind, found in split.get("reasons", {}).items()})
    if not counts:
        return None
    splits = list(dict.fromkeys(split for split, _ in counts))
    kinds = sorted({kind for _, kind in counts}, key=lambda kind: -sum(counts[split, kind] for split in splits))
    rows = [
        [
            text(kind.replace("_", " ")),
            *(number(counts[split, kind], words.count(counts[split, kind])) for split in splits),
            text(_example(run.rejects, kind)),
        ]
        for kind in kinds
    ]
    titles = [{"train": "training", "val": "validation"}.get(split, split) for split in splits]
    return make_table(["reason", *titles, "example"], rows)


def _example(rejects: Rejects | None, kind: str) -> str:
    row = next((row for row in rejects.rows if row["kind"] == kind), None) if rejects else None
    if row is None:
        return ""
    name = row["path"].rsplit("/", 1)[-1]
    return f"{name}: {row['reason']}" if name else row["reason"]


GUARD_FAULTS = {"text_on_silence": "text on silence", "loops": "loops", "bad_timestamps": "bad timestamps"}


def guard(run: Run) -> Table | None:
    """What the model must not forget."""
    found = run.metrics.get("guard")
    if not found:
        return None
    base, tuned = found["base"], found["tuned"]
    rows = [[text("WER"), rate(base.get("wer")), rate(tuned.get("wer"))]]
    if len(tuned.get("languages", {})) > 1:
        rows += [
            [text(f"WER, {words.language(code)}"), rate(base["languages"].get(code)), rate(wer)]
            for code, wer in tuned["languages"].items()
        ]
    for kind, label in GUARD_FAULTS.items():
        before, after = base.get(kind), tuned.get(kind)
        mark = "bad" if (after or 0) > (before or 0) else ""
        rows.append(
            [text(f"clips with {label}"), number(before, words.count(before)), number(after, words.count(after), mark)]
        )
    return make_table(["", "base", "tuned"], rows)


@dataclass(frozen=True)
class Setting:
    """A setting of the run."""

    path: str
    value: str
    default: str | None
    """None: the run has the default."""


def settings(run: Run) -> list[Setting]:
    """Every setting of the spec, those that differ from the default first."""
    defaults = leaves(JobSpec().model_dump(mode="json"))
    found = []
    for path, value in leaves(run.spec).items():
        # A setting that this version does not know has no default here.
        default = None if path not in defaults or same_value(value, defaults[path]) else words.setting(defaults[path])
        found.append(Setting(path, words.setting(value), default))
    return sorted(found, key=lambda setting: setting.default is None)


def trials(search: Search) -> Table:
    """The table of a search; columns that are there for sorting have their value as the key."""
    names = searched(search)
    label = "WER" if search.metric == "wer" else "loss"
    head = ["trial", "from", "status", label, "final WER", "parameters", "work", "step", *map(short, names), "cause"]
    rows = []
    for trial in search.trials:
        repeats = f" ± {_spread(trial, search)}" if len(trial.scores) > 1 else ""
        steps = f"{words.count(trial.step)} of {words.count(trial.steps)}" if trial.steps else words.count(trial.step)
        status = {"failed": "bad", "finished": "", "stopped": "muted"}.get(trial.status, "")
        rows.append(
            [
                text(f"{trial.id} ★ winner" if trial.id == search.winner else trial.id),
                text(trial.origin if is_real(trial) else words.NONE),
                text(trial.status if is_real(trial) else words.NONE, status),
                number(trial.score, score_text(search, trial.score) + repeats),
                rate(trial.final),
                number(trial.trainable_parameters, words.count(trial.trainable_parameters)),
                number(trial.seconds, words.clock(trial.seconds) if is_real(trial) else words.NONE),
                number(trial.step, steps),
                *(_setting(trial, name) for name in names),
                text(trial.cause, "long"),
            ]
        )
    marks = [
        "winner"
        if trial.id == search.winner
        else trial.origin
        if trial.origin in ("untuned", "defaults")
        else trial.status
        for trial in search.trials
    ]
    table = make_table(head, rows, marks)
    return Table(table.head, table.rows, table.marks, [trial.id for trial in search.trials])


def _setting(trial: Trial, name: str) -> Cell:
    if name not in trial.settings:
        return Cell(words.NONE, float("inf"))
    value = trial.settings[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(float(value), f"{value:.3g}" if isinstance(value, float) else words.setting(value))
    return text(words.setting(value))


def _spread(trial: Trial, search: Search) -> str:
    spread = (max(trial.scores) - min(trial.scores)) / 2
    return f"{100 * spread:.1f}" if search.metric == "wer" else f"{spread:.4f}"


@dataclass(frozen=True)
class Share:
    """How long a stage took."""

    name: str
    seconds: str
    share: float


def stages(run: Run) -> list[Share]:
    """Where the time went."""
    seconds = {name: value for name, value in run.metrics.get("seconds", {}).items() if name != "total"}
    longest = max(seconds.values(), default=0) or 1
    return [Share(name, words.clock(value), value / longest) for name, value in seconds.items()]
