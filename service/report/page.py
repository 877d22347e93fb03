"""The page: one file that opens by a double click, asks nothing of any network, and treats transcripts as text."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from service.artifacts import RunManifest
from service.report import search_figures, tables, words
from service.report.figures import Figure, clip_lengths, errors_by_length, learning_curves
from service.report.lengths import by_length, histogram, histogram_of
from service.report.lines import join
from service.report.paired import Difference, difference, in_words
from service.report.run import Run, read_run
from service.report.search_figures import is_real
from service.report.utterances import Utterances, collect
from service.storage import Storage
from service.trials import Search


def report_page(root: Storage, manifest: RunManifest | None = None) -> str:
    """report.html of a run.

    Args:
        root: its root.
        manifest: what is about to be written as manifest.json, where it is not there yet.

    Raises:
        NotFoundError: it is no root of a run.
        InputError: one of its files cannot be read.
    """
    return render_report(read_run(root, manifest))


@dataclass(frozen=True)
class Step:
    """One figure of the verdict: which model, its error rate, and the interval around it."""

    label: str
    value: str
    bounds: str = ""
    note: str = ""
    metric: str = "WER"


def render_report(run: Run) -> str:
    """The page of a run that was read."""
    sides = [name for name in ("base", "tuned", "model") if name in run.sides]
    clips = join([run.sides[name] for name in sides])
    pairs = [(one[0], one[-1]) for one in clips] if len(sides) > 1 else []
    bins = by_length(clips)
    utterances = collect(sides, clips) if clips else None
    curves = learning_curves(run.curves, run.metrics.get("base"), run.metrics.get("training", {}).get("best_step"))
    length_figure = errors_by_length(bins, sides) if bins else None
    data_figure = _clip_lengths(run)
    searched = search_figures.search_figures(run.search) if run.search else []
    figures = [*curves, *searched, *(one for one in (length_figure, data_figure) if one)]
    return render(
        "report.html",
        figures,
        {"utterances": utterances.content} if utterances else {},
        run=run,
        words=words,
        tables=tables,
        verdict=_verdict(run),
        steps=_steps(run),
        said=_said(run, difference(pairs)),
        curves=curves,
        searched=searched,
        lengths=length_figure,
        data_lengths=data_figure,
        utterances=utterances,
        parts=_parts(run, utterances, curves),
    )


def render(template: str, figures: list[Figure], content: dict[str, Any], **values: Any) -> str:
    """A page from its template, with everything in it that it needs.

    Args:
        template: its file.
        figures: what it draws; plotly.js goes in where there are any.
        content: more that its script takes.
        values: what the template takes.
    """
    scripts = [_asset("report.js")]
    if figures:
        scripts.insert(0, plotly_js())
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_source_hash, scripts))}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    data = content | {"figures": [figure.as_dict() for figure in figures]}
    page = _environment().get_template(template)
    made = page.render(
        values
        | {
            "policy": policy,
            "style": Markup(_asset("report.css")),
            "scripts": [Markup(script) for script in scripts],
            "data": script_json(data),
        }
    )
    return made.encode("utf-8", "replace").decode()  # a file's name may hold what is no character


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("service.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return (files("service.report") / "templates" / name).read_text("utf-8")


@functools.cache
def plotly_js() -> str:
    """plotly.js as its package ships it, 4.8 MB; nothing in it ends a script element."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text("utf-8")


def _source_hash(script: str) -> str:
    """How a content security policy names a script that may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


_ESCAPED = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def script_json(content: Any) -> Markup:
    """JSON that may stand in a script element: no text in it can end that element, or open a comment there."""
    written = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone surrogate, which JSON may carry, cannot be written as UTF-8.
    return Markup(written.translate(_ESCAPED).encode("utf-8", "backslashreplace").decode())


def _verdict(run: Run) -> tuple[str, str, list[str]]:
    """How the run has ended: (mark, word, reasons)."""
    if not run.metrics:
        return "open", "Not finished", ["this run has not published its results yet; here is what it has shown so far"]
    if "promoted" not in run.metrics or run.metrics["promoted"] is None:
        return "plain", {"evaluate": "Scored", "export": "Exported"}.get(run.kind, "Finished"), []
    if run.metrics["promoted"]:
        return "good", "Promoted", []
    return "bad", "Not promoted", list(run.metrics.get("promotion_reasons", []))


def _steps(run: Run) -> list[Step]:
    """The error rates that the verdict is about, in their order: before, after."""
    found = []
    for name, label in {"base": "base model", "tuned": "tuned model", "model": "model"}.items():
        rates = run.metrics.get(name)
        if rates and rates.get("wer") is not None:
            found.append(Step(label, words.percent(rates["wer"]), words.interval(rates.get("wer_interval"))))
    if found:
        return _with_defaults(run, found)
    if run.search:
        return _search_steps(run.search)
    if run.curves.evaluations:
        last = max(run.curves.evaluations)
        found.append(Step(f"at step {last}", words.percent(run.curves.evaluations[last].get("wer"))))
    return found


def _with_defaults(run: Run, found: list[Step]) -> list[Step]:
    """The same and, of a search, what the defaults alone have come to."""
    if run.search is None or run.search.metric != "wer" or len(found) < 2:
        return found
    trial = next((trial for trial in run.search.trials if trial.origin == "defaults"), None)
    if trial is None or trial.score is None or trial.id == run.search.winner:
        return found
    return [found[0], Step("defaults", words.percent(trial.score), note=f"trial {trial.id}"), *found[1:]]


def _search_steps(search: Search) -> list[Step]:
    """Of a search that is not at its end: the untuned model, the defaults, and the best trial so far."""
    metric = search_figures.label_of(search)
    best = min(search_figures.scored_trials(search), key=lambda trial: trial.score or 0.0, default=None)
    found = []
    for trial in (trial for trial in search.trials if trial.score is not None):
        known = trial.origin in ("untuned", "defaults")
        if known or trial is best:
            label = trial.origin if known else "best so far" if search.winner is None else "winner"
            score = search_figures.score_text(search, trial.score)
            found.append(Step(label, score, note=f"trial {trial.id}" if is_real(trial) else "", metric=metric))
    return found


def _said(run: Run, change: Difference | None) -> list[str]:
    """The verdict in sentences."""
    said = []
    base, tuned = run.metrics.get("base"), run.metrics.get("tuned")
    if base and tuned and "substitutions" in base:
        before, after = (sum(one[key] for key in ("substitutions", "deletions", "insertions")) for one in (base, tuned))
        text = f"{words.counted(before, 'word error')} became {words.count(after)}"
        if before and after < before:
            text += f", {1 - after / before:.0%} fewer"
        said.append(
            f"{text}, in {words.counted(tuned['words'], 'word')} of {words.counted(tuned['utterances'], 'clip')}."
        )
    if change:
        said.append(
            f"The difference is {in_words(change.as_dict())}. {words.counted(change.better, 'clip')} got better, "
            f"{words.count(change.worse)} worse, {words.count(change.clips - change.better - change.worse)} stayed."
        )
    if run.search and run.search.verdict:
        said.insert(0, run.search.verdict)
    return said


def _clip_lengths(run: Run) -> Figure | None:
    splits = {
        name: found
        for name, split in run.data.items()
        if isinstance(split, dict) and (found := histogram(split)) and any(found.clips)
    }
    if not splits and (found := histogram_of(run.result)):
        splits = {"val": found}
    return clip_lengths(splits) if splits else None


def _parts(run: Run, utterances: Utterances | None, curves: list[Figure]) -> dict[str, str]:
    """The sections that this page has, by their ids."""
    present = {
        "verdict": ("Verdict", True),
        "search": ("Search", run.search is not None),
        "training": ("Learning curves", bool(curves)),
        "errors": ("Errors", utterances is not None),
        "exports": ("Exports", bool(run.metrics.get("artifacts"))),
        "guard": ("Guard", "guard" in run.metrics),
        "data": ("Data", bool(run.data)),
        "settings": ("Settings and versions", True),
    }
    return {name: title for name, (title, there) in present.items() if there}
