"""Runs side by side: settings that differ, figures, and the utterances that got better or worse."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.report import words
from service.report.lines import Line, join
from service.report.page import render
from service.report.paired import Difference, difference, in_words
from service.report.run import Run
from service.report.utterances import Utterances, collect
from service.spec.job import NOT_COMPARED, JobSpec, leaves, same_value

SHOWN = 20
SHOWN_IN_TEXT = 5
"""Utterances that got better, and worse, in JSON and in a terminal; the page has them all."""


@dataclass(frozen=True)
class Row:
    """One line of a table with a column for each run: as people read it, and as programs do.

    Attributes:
        best: the run with the lowest value, where lower is better and there is one; else None.
    """

    label: str
    texts: list[str]
    values: list[Any]
    best: int | None = None


@dataclass(frozen=True)
class Pair:
    """The first run and another one, on the clips that both were scored on.

    Attributes:
        other: which run.
        clips: each as both have heard it.
        difference: of their error rates; None: there are no clips in common.
        only_first: clips of the first run that the other was not scored on.
        only_other: the other way round.
    """

    other: int
    clips: list[tuple[Line, ...]]
    difference: Difference | None
    only_first: int
    only_other: int

    def changed(self) -> tuple[list[tuple[Line, ...]], list[tuple[Line, ...]]]:
        """Clips that got worse and clips that got better, those that changed most first."""
        worse = [one for one in self.clips if one[1].errors > one[0].errors]
        better = [one for one in self.clips if one[1].errors < one[0].errors]
        worse.sort(key=lambda one: one[0].errors - one[1].errors)
        better.sort(key=lambda one: one[1].errors - one[0].errors)
        return worse, better


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        names: of the runs, unlike each other.
        roots: of them.
        settings: those that differ.
        metrics: of all runs.
        pairs: the first run with each other one.
        notes: what makes the figures less alike than they look.
    """

    names: list[str]
    roots: list[str]
    settings: list[Row]
    metrics: list[Row]
    pairs: list[Pair]
    notes: list[str]


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare the first run with each of the others.

    Args:
        runs: two or more.
    """
    names = _names(runs)
    pairs = [_pair(runs[0], run, index) for index, run in enumerate(runs[1:], start=1)]
    notes = []
    for pair in pairs:
        if pair.only_first or pair.only_other:
            common, alone = words.counted(len(pair.clips), "clip"), words.count(pair.only_first)
            notes.append(
                f"{names[0]} and {names[pair.other]} were not scored on the same clips: {common} in common, {alone} "
                f"of the first alone, {words.count(pair.only_other)} of the other. Utterances are compared where both "
                "have them; the rates in the table are each run's own."
            )
    unfinished = [name for name, run in zip(names, runs, strict=True) if not run.metrics]
    notes += [f"{name} has not published its results yet." for name in unfinished]
    return Comparison(names, [run.uri for run in runs], differing_settings(runs), metrics(runs), pairs, notes)


def _names(runs: Sequence[Run]) -> list[str]:
    names = [run.job_id for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.uri.rstrip('/').rsplit('/', 1)[-1]}, {index})"
        for index, (name, run) in enumerate(zip(names, runs, strict=True), start=1)
    ]


def differing_settings(runs: Sequence[Run]) -> list[Row]:
    """Settings that are not alike in all runs, but for names and places; and the winner's, where a run has searched."""
    defaults = leaves(JobSpec().model_dump(mode="json"))
    specs = [leaves(run.spec) for run in runs]
    for spec, run in zip(specs, runs, strict=True):
        for name, value in _won(run).items():
            spec[name if name in spec or name in defaults else f"training.{name}"] = value
    rows = []
    for path in dict.fromkeys(path for spec in specs for path in spec):
        values = [spec.get(path, defaults.get(path)) for spec in specs]
        alike = all(same_value(value, values[0]) for value in values)
        if not alike and path not in NOT_COMPARED and not path.startswith("storage."):
            rows.append(Row(path, [words.setting(value) for value in values], values))
    return rows


def _won(run: Run) -> dict[str, Any]:
    trials = run.search.trials if run.search else []
    return next((trial.settings for trial in trials if run.search and trial.id == run.search.winner), {})


Reader = Callable[[Run], Any]


def metrics(runs: Sequence[Run]) -> list[Row]:
    """Figures of all runs; those that no run has are left out."""

    def final(key: str) -> Reader:
        return lambda run: run.metrics.get(run.final or "", {}).get(key)

    def inside(section: str, key: str) -> Reader:
        return lambda run: run.metrics.get(section, {}).get(key)

    readers: list[tuple[str, Reader, Callable[[Any], str]]] = [
        ("promoted", lambda run: run.metrics.get("promoted"), lambda value: "yes" if value else "no"),
        ("WER base", inside("base", "wer"), lambda value: words.percent(value, 2)),
        ("WER", final("wer"), lambda value: words.percent(value, 2)),
        ("WER, 95 % interval", final("wer_interval"), words.interval),
        ("CER base", inside("base", "cer"), lambda value: words.percent(value, 2)),
        ("CER", final("cer"), lambda value: words.percent(value, 2)),
        ("WER, raw text", final("wer_raw"), lambda value: words.percent(value, 2)),
    ]
    codes = sorted({code for run in runs for code in (final("languages")(run) or {})})
    if len(codes) > 1:
        readers += [
            (f"WER, {words.language(code)}", _in_language(code), lambda value: words.percent(value, 2))
            for code in codes
        ]
    for name in dict.fromkeys(name for run in runs for name in run.metrics.get("artifacts", {})):
        readers.append((f"WER of {name}", _of_artifact(name), _artifact_text))
    readers += [
        ("substituted words", final("substitutions"), words.count),
        ("deleted words", final("deletions"), words.count),
        ("inserted words", final("insertions"), words.count),
        ("clips", final("utterances"), words.count),
        ("trainable parameters", inside("adapter", "trainable_parameters"), words.count),
        ("steps", inside("training", "steps"), words.count),
        ("published step", inside("training", "best_step"), words.count),
        ("training, clips per second", inside("training", "clips_per_s"), lambda value: f"{value:.4g}"),
        ("time", inside("seconds", "total"), words.clock),
        ("base model", _base, str),
        ("base model's weights, SHA-256", _weights, lambda value: str(value)[:12]),
        ("training data, SHA-256", _data("train"), lambda value: str(value)[:12]),
        ("validation data, SHA-256", _data("val"), lambda value: str(value)[:12]),
    ]
    rows = []
    for label, read, write in readers:
        values = [read(run) for run in runs]
        if any(value is not None for value in values):
            texts = [words.NONE if value is None else write(value) for value in values]
            rows.append(Row(label, texts, values, _lowest(values) if label.startswith(("WER", "CER")) else None))
    return rows


def _lowest(values: Sequence[Any]) -> int | None:
    """Which rate is the lowest; None: several are, or they are no rates."""
    rates = [value["wer"] if isinstance(value, dict) else value for value in values]
    known = [rate for rate in rates if isinstance(rate, float)]
    return rates.index(min(known)) if known and known.count(min(known)) == 1 and len(known) > 1 else None


def _in_language(code: str) -> Reader:
    return lambda run: run.metrics.get(run.final or "", {}).get("languages", {}).get(code, {}).get("wer")


def _of_artifact(name: str) -> Reader:
    def read(run: Run) -> Any:
        entry = run.metrics.get("artifacts", {}).get(name)
        return None if entry is None else {"wer": entry.get("wer"), "refused": entry.get("refused")}

    return read


def _artifact_text(value: dict[str, Any]) -> str:
    return words.percent(value["wer"], 2) + (" (refused)" if value["refused"] else "")


def _base(run: Run) -> Any:
    if run.manifest and run.manifest.base:
        base = run.manifest.base
        # Of a local folder the name: where it lay says nothing to a reader, and two copies may be alike.
        return f"{base.name} at {base.revision[:12]}" if base.revision else base.name.rstrip("/").rsplit("/", 1)[-1]
    return leaves(run.spec).get("training.base_model")


def _weights(run: Run) -> Any:
    found = run.manifest.base.weights_sha256 if run.manifest and run.manifest.base else {}
    # Of several files one hash over theirs.
    if len(found) > 1:
        return hashlib.sha256("".join(found.values()).encode()).hexdigest()
    return next(iter(found.values()), None)


def _data(split: str) -> Reader:
    def read(run: Run) -> Any:
        found = run.data.get(split)
        return found.get("sha256") if isinstance(found, dict) else None

    return read


def _pair(first: Run, other: Run, index: int) -> Pair:
    clips = join([first.result, other.result])
    changed = difference([(one[0], one[1]) for one in clips])
    return Pair(index, clips, changed, len(first.result) - len(clips), len(other.result) - len(clips))


def as_dict(found: Comparison) -> dict[str, Any]:
    """For programs."""
    return {
        "runs": [{"name": name, "root": root} for name, root in zip(found.names, found.roots, strict=True)],
        "settings": {row.label: row.values for row in found.settings},
        "metrics": {row.label: row.values for row in found.metrics},
        "pairs": [_pair_dict(found, pair) for pair in found.pairs],
        "notes": found.notes,
    }


def _pair_dict(found: Comparison, pair: Pair) -> dict[str, Any]:
    worse, better = pair.changed()
    change = pair.difference
    return {
        "first": found.names[0],
        "other": found.names[pair.other],
        "clips": len(pair.clips),
        "only_first": pair.only_first,
        "only_other": pair.only_other,
        "wer_difference": change.rate if change else None,
        "wer_difference_interval": list(change.bounds) if change else None,
        "better": len(better),
        "worse": len(worse),
        "got_worse": [_line_dict(one) for one in worse[:SHOWN]],
        "got_better": [_line_dict(one) for one in better[:SHOWN]],
    }


def _line_dict(sides: tuple[Line, ...]) -> dict[str, Any]:
    first, other = sides
    return {
        "path": other.path,
        "language": other.language,
        "reference": other.reference,
        "hypotheses": [first.hypothesis, other.hypothesis],
        "errors": [first.errors, other.errors],
        "words": other.words,
    }


def said(pair: Pair) -> str:
    """A pair in a sentence or two."""
    if pair.difference is None:
        return "They have no clips in common."
    change = pair.difference
    return (
        f"On {words.counted(change.clips, 'common clip')} the WER goes from {words.percent(change.before, 2)} to "
        f"{words.percent(change.after, 2)}: {in_words(change.as_dict())}. "
        f"{words.counted(change.better, 'clip')} got better, {words.count(change.worse)} worse."
    )


def compare_page(found: Comparison) -> str:
    """The comparison as a page of the report's kind."""
    lists: dict[int, Utterances] = {
        pair.other: collect([found.names[0], found.names[pair.other]], pair.clips) for pair in found.pairs if pair.clips
    }
    content = {f"pair-{index}": one.content for index, one in lists.items()}
    return render("compare.html", [], content, found=found, words=words, said=said, lists=lists)
