"""The plots of a search: settings against scores, and what the search has cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from service.report.figures import Figure
from service.report.words import count, counted, percent, setting
from service.trials import UNTUNED, Search, Trial

LOGARITHMIC = ("lr", "learning_rate", "weight_decay")
"""Settings that are told apart by their magnitude."""

MISSING = "not set"

Place = tuple[float, str]
"""Where a value lies on its axis, 0 to 1, and how it is written."""


def search_figures(search: Search) -> list[Figure]:
    """Those plots that the table has something for."""
    found = [
        parallel_coordinates(search),
        importance(search),
        score_by_size(search),
        best_by_time(search),
        trials_by_time(search),
    ]
    return [figure for figure in found if figure is not None]


def label_of(search: Search) -> str:
    """The metric by its usual name."""
    return "WER" if search.metric == "wer" else "validation loss"


def score_text(search: Search, score: float | None) -> str:
    """A score as people read it."""
    return percent(score) if search.metric == "wer" or score is None else f"{score:.4f}"


def searched(search: Search) -> list[str]:
    """The settings that were searched, in the order in which they turn up."""
    return list(dict.fromkeys(name for trial in search.trials for name in trial.settings))


def short(name: str) -> str:
    """A setting without its section."""
    return name.removeprefix("training.")


def is_real(trial: Trial) -> bool:
    """Whether it was trained."""
    return trial.origin != UNTUNED and trial.id != UNTUNED


def scored_trials(search: Search) -> list[Trial]:
    """Those that may win: one that failed has perhaps had a score before, and is none of them."""
    return [t for t in search.trials if is_real(t) and t.score is not None and t.status != "failed"]


def _colour(search: Search, trial: Trial) -> str:
    return "@good" if trial.id == search.winner else "@base" if trial.origin == "defaults" else "@tuned"


def _symbol(search: Search, trial: Trial) -> str:
    return "star" if trial.id == search.winner else "diamond" if trial.origin == "defaults" else "circle"


def ceiling(search: Search) -> float:
    """Where the axes of scores end: a trial that has come apart would leave no room to tell the others apart."""
    untuned = next((trial.score for trial in search.trials if not is_real(trial)), None)
    worst = max((trial.score for trial in scored_trials(search) if trial.score is not None), default=0.0)
    return math.inf if not untuned or worst <= 1.5 * untuned else 1.1 * untuned


def _axis_format(search: Search) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": label_of(search)}, "rangemode": "nonnegative"}
    if (top := ceiling(search)) < math.inf:
        axis["range"] = [0, top]
    return axis | ({"tickformat": ".0%"} if search.metric == "wer" else {})


def _above(search: Search) -> str:
    """What a note says of trials that lie above the axis."""
    top = ceiling(search)
    beyond = [trial.id for trial in scored_trials(search) if trial.score is not None and trial.score > top]
    return f" Above the scale: {', '.join(beyond)}." if beyond else ""


def parallel_coordinates(search: Search) -> Figure | None:
    """A line for every scored trial over an upright axis for each setting and one for the score.

    Drawn as lines of an ordinary plot, not by plotly's own kind, which needs WebGL, takes no missing values and cannot
    be hovered over. The page adds the choice of trials by a box over an axis.
    """
    trials, names = scored_trials(search), searched(search)
    names = [name for name in names if len({repr(trial.settings.get(name)) for trial in trials}) > 1]
    if len(trials) < 2 or not names:
        return None
    axes = [_axis(short(name), [trial.settings.get(name) for trial in trials]) for name in names]
    scores = [trial.score for trial in trials if trial.score is not None]
    top = ceiling(search)
    over = {score_text(search, top): f"over {score_text(search, top)}"} if top < math.inf else {}
    places, ticks = _numbers(
        [min(score, top) for score in scores], logarithmic=False, write=lambda value: score_text(search, value)
    )
    axes.append((places, [(place, over.get(text, text)) for place, text in ticks]))
    best, worst = min(scores), min(max(scores), top)
    data = []
    for index in sorted(range(len(trials)), key=lambda index: -scores[index]):  # the best ones on top
        trial = trials[index]
        wins = trial.id == search.winner
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": trial.id,
                "x": list(range(len(axes))),
                "y": [places[index][0] for places, _ in axes],
                "line": {"color": "@good" if wins else _shade(scores[index], best, worst), "width": 4 if wins else 1.5},
                "marker": {"size": 9 if wins else 6, "symbol": _symbol(search, trial)},
                "text": _hover(search, trial),
                "hovertemplate": "%{text}<extra></extra>",
                "meta": trial.id,
            }
        )
    titles = [*map(short, names), label_of(search)]
    layout = {
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": "select",
        "xaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(axes))),
            "ticktext": [_wrapped(title) for title in titles],
            "side": "top",
            "range": [-0.25, len(axes) - 0.5],
            "showgrid": True,
            "gridcolor": "@axis",
            "gridwidth": 2,
            "zeroline": False,
            "fixedrange": True,
        },
        "yaxis": {"visible": False, "range": [-0.06, 1.06], "fixedrange": True},
        "margin": {"l": 16, "r": 24, "t": 56, "b": 16},
        "annotations": [
            {
                "x": index,
                "y": place,
                "text": text,
                "showarrow": False,
                "xanchor": "left",
                "xshift": 7,
                "font": {"size": 11, "color": "@text"},
                "bgcolor": "@veil",
                "borderpad": 1,
            }
            for index, (_, ticks) in enumerate(axes)
            for place, text in ticks
        ],
    }
    winner = next((trial for trial in trials if trial.id == search.winner), None)
    won = f" The winner, {winner.id}, has {score_text(search, winner.score)}." if winner else ""
    alt = f"{counted(len(trials), 'scored trial')} over {', '.join(titles)}.{won}"
    return Figure(
        "parallel-coordinates",
        "Settings and scores",
        alt,
        data,
        layout,
        note="Each line is a trial: the stronger its colour, the better, and the winner is thick. Drag a box over a "
        "part of an axis to keep only the trials that pass there, in the table below too; with Shift, over a second "
        "axis. A double click shows all.",
        is_wide=True,
        height_px=420,
        width_px=130 * len(axes),
    )


def _shade(score: float, best: float, worst: float) -> str:
    """One of five shades of one colour: 0 is the best."""
    share = min(1.0, (score - best) / (worst - best)) if worst > best else 0.0
    return f"@shade{min(4, int(5 * share))}"


def _axis(name: str, values: Sequence[Any]) -> tuple[list[Place], list[Place]]:
    """The values' places on an axis, and its ticks."""
    known = [value for value in values if value is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    if numeric and len(known) == len(values) and len(set(known)) > 1:
        return _numbers([float(value) for value in known], logarithmic=_is_logarithmic(name, known), write=setting)
    if numeric:
        kinds: list[Any] = sorted(set(known))
    else:
        kinds = sorted({repr(value): value for value in known}.values(), key=lambda value: setting(value))
    labels = [*([MISSING] if len(known) < len(values) else []), *(setting(kind) for kind in kinds)]
    places = {label: index / max(1, len(labels) - 1) for index, label in enumerate(labels)}
    ticks = [(place, _written(label)) for label, place in places.items()]
    return [(places[MISSING if value is None else setting(value)], setting(value)) for value in values], ticks


def _is_logarithmic(name: str, values: Sequence[float]) -> bool:
    return min(values) > 0 and (name in LOGARITHMIC or max(values) / min(values) >= 8)


def _numbers(values: Sequence[float], *, logarithmic: bool, write: Any) -> tuple[list[Place], list[Place]]:
    scale = math.log10 if logarithmic else float
    low, high = min(values), max(values)
    span = scale(high) - scale(low) or 1.0
    places = [((scale(value) - scale(low)) / span, write(value)) for value in values]
    distinct = sorted(set(values))
    if len(distinct) <= 6:
        ticks = [((scale(value) - scale(low)) / span, write(value)) for value in distinct]
    elif logarithmic:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        marks = sorted({low, high, *(10.0**power for power in powers)})
        ticks = [((scale(value) - scale(low)) / span, f"{value:.2g}") for value in marks]
    else:
        ticks = [(step / 4, write(float(f"{low + step * span / 4:.3g}"))) for step in range(5)]
    return places, _apart(ticks)


def _apart(ticks: list[Place], gap: float = 0.06) -> list[Place]:
    """The ticks without those that would be written over others; the first and the last stay."""
    if len(ticks) < 2:
        return ticks
    kept = [ticks[0]]
    for tick in ticks[1:-1]:
        if tick[0] - kept[-1][0] >= gap and ticks[-1][0] - tick[0] >= gap:
            kept.append(tick)
    return [*kept, ticks[-1]]


def _written(value: Any, most: int = 22) -> str:
    """A setting's value, cut; plotly reads some HTML, which a value may hold."""
    text = setting(value)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _wrapped(name: str) -> str:
    return name.replace("_", "_<br>", 1) if len(name) > 10 and "_" in name else name


def importance(search: Search) -> Figure | None:
    """A bar for each setting."""
    if not search.importance:
        return None
    found = sorted(search.importance.items(), key=lambda item: item[1])
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [share for _, share in found],
        "y": [short(name) for name, _ in found],
        "marker": {"color": "@tuned"},
        "text": [f"{share:.0%}" for _, share in found],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }
    layout = {
        "xaxis": {"tickformat": ".0%", "rangemode": "tozero", "range": [0, min(1.15, 1.18 * found[-1][1] or 1)]},
        "yaxis": {"type": "category"},
        "showlegend": False,
    }
    alt = "Importance: " + ", ".join(f"{short(name)} {share:.0%}" for name, share in reversed(found)) + "."
    return Figure(
        "importance",
        "Importance of each setting",
        alt,
        [bars],
        layout,
        note="The share of the spread of the scores that goes with this setting (PED-ANOVA).",
        height_px=max(180, 70 + 30 * len(found)),
    )


def score_by_size(search: Search) -> Figure | None:
    """Score against trainable parameters."""
    trials = [trial for trial in scored_trials(search) if trial.trainable_parameters]
    if not trials:
        return None
    sizes = [trial.trainable_parameters or 1 for trial in trials]
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": sizes,
        "y": [trial.score for trial in trials],
        "text": [_hover(search, trial) for trial in trials],
        "marker": {
            "size": [14 if trial.id == search.winner else 9 for trial in trials],
            "color": [_colour(search, trial) for trial in trials],
            "symbol": [_symbol(search, trial) for trial in trials],
            "opacity": 0.85,
            "line": {"width": 1, "color": "@surface"},
        },
        "hovertemplate": "%{text}<extra></extra>",
    }
    wide = max(sizes) / min(sizes) >= 8
    scale = {"type": "log", "dtick": 1 if max(sizes) / min(sizes) >= 100 else "D2"} if wide else {"rangemode": "tozero"}
    axis = {"title": {"text": "trainable parameters"}, "tickformat": "~s"} | scale
    layout = {"xaxis": axis, "yaxis": _axis_format(search), "showlegend": False, "hovermode": "closest"}
    smallest = min(trials, key=lambda trial: trial.score or 0)
    alt = (
        f"{label_of(search)} by trainable parameters of {counted(len(trials), 'trial')}, from {count(min(sizes))} to "
        f"{count(max(sizes))}; the best, {smallest.id}, has {count(smallest.trainable_parameters)}."
    )
    title = f"{label_of(search)} against trainable parameters"
    return Figure("score-by-size", title, alt, [points], layout, note=_above(search).strip())


def best_by_time(search: Search) -> Figure | None:
    """Every trial's score and the best one so far, by the time that all trials before it have worked."""
    trials = [trial for trial in search.trials if is_real(trial)]
    spent, best = 0.0, math.inf
    hours: list[float] = []
    scores: list[float] = []
    so_far: list[float] = []
    shown: list[Trial] = []
    for trial in trials:
        spent += trial.seconds
        if trial.score is None or trial.status == "failed":
            continue
        best = min(best, trial.score)
        hours.append(spent)
        scores.append(trial.score)
        so_far.append(best)
        shown.append(trial)
    if not shown:
        return None
    unit, divisor = _unit(spent)
    hours = [one / divisor for one in hours]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "trial",
            "x": hours,
            "y": scores,
            "text": [_hover(search, trial) for trial in shown],
            "marker": {
                "size": [14 if trial.id == search.winner else 7 for trial in shown],
                "color": [_colour(search, trial) for trial in shown],
                "symbol": [_symbol(search, trial) for trial in shown],
            },
            "hovertemplate": "%{text}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [*hours, spent / divisor],
            "y": [*so_far, best],
            "line": {"shape": "hv", "color": "@good", "width": 2},
            "hoverinfo": "skip",
        },
    ]
    layout = {
        "xaxis": {"title": {"text": f"{unit} of work, all trials"}, "rangemode": "tozero"},
        "yaxis": _axis_format(search),
        "showlegend": False,
        "hovermode": "closest",
    }
    alt = f"Best {label_of(search)} so far: from {score_text(search, so_far[0])} of the first trial to "
    alt += f"{score_text(search, best)} after {spent / divisor:.1f} {unit} of work."
    return Figure(
        "best-by-time",
        f"Best {label_of(search)} so far",
        alt,
        data,
        layout,
        note="Trials in the order of their beginning, each at the end of its own work; the star is the winner, the "
        f"diamond the defaults. The line is the best so far.{_above(search)}",
    )


def trials_by_time(search: Search) -> Figure | None:
    """Every evaluation of every trial, by the time that the trial had worked until then."""
    trials = [trial for trial in search.trials if is_real(trial) and trial.evaluations]
    if not trials:
        return None
    unit, divisor = _unit(max(one.seconds for trial in trials for one in trial.evaluations))
    data = []
    for trial in sorted(trials, key=lambda trial: trial.id == search.winner):  # the winner on top
        wins = trial.id == search.winner
        for number, seed in enumerate(dict.fromkeys(one.seed for one in trial.evaluations)):
            found = [one for one in trial.evaluations if one.seed == seed]
            repeat = f", seed {seed}" if number else ""
            values = [one.wer if search.metric == "wer" else one.loss for one in found]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": trial.id,
                    "x": [one.seconds / divisor for one in found],
                    "y": [one.score if value is None else value for one, value in zip(found, values, strict=True)],
                    "line": {"color": "@good", "width": 3} if wins else _line(trial),
                    "marker": {"size": 6 if wins else 4},
                    "opacity": 1 if wins else 0.65,
                    "text": [f"{_hover(search, trial)}{repeat}<br>step {one.step}" for one in found],
                    "hovertemplate": "%{text}<br>%{y:.4~p}<extra></extra>"
                    if search.metric == "wer"
                    else "%{text}<br>%{y:.4~g}<extra></extra>",
                }
            )
    layout = {
        "xaxis": {"title": {"text": f"{unit} that the trial has worked"}, "rangemode": "tozero"},
        "yaxis": _axis_format(search),
        "showlegend": False,
        "hovermode": "closest",
    }
    alt = f"{label_of(search)} of every evaluation of {counted(len(trials), 'trial')} by the time it has worked."
    return Figure(
        "trials-by-time",
        f"{label_of(search)} against time",
        alt,
        data,
        layout,
        note="Each line is a trial; the winner's is thick, dotted ones were stopped early, dashed ones failed."
        f"{_above(search)}",
    )


def _line(trial: Trial) -> dict[str, Any]:
    colour, dash = {"failed": ("@bad", "dash"), "stopped": ("@muted", "dot")}.get(trial.status, ("@tuned", "solid"))
    return {"color": colour, "dash": dash, "width": 1}


def _hover(search: Search, trial: Trial) -> str:
    role = "winner" if trial.id == search.winner else trial.origin
    said = "<br>".join(f"{short(name)} {_written(value, 60)}" for name, value in trial.settings.items())
    return f"<b>{trial.id}</b> ({role}), {label_of(search)} {score_text(search, trial.score)}<br>{said}"


def _unit(seconds: float) -> tuple[str, float]:
    return ("hours", 3600.0) if seconds >= 5400 else ("minutes", 60.0) if seconds >= 180 else ("seconds", 1.0)
