"""The plots of a training, as plotly.js takes them.

Colours stand as names, "@tuned": the page puts in those of its light or dark dress, and draws anew when that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.report.curves import Curves
from service.report.lengths import Bin, Histogram
from service.report.words import count, counted, percent


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        id: of its place in the page.
        title: above it.
        alt: what it shows, in a sentence, for who does not see it.
        data: plotly's traces.
        layout: plotly's layout, beside what all plots of the page share.
        note: below it.
        is_wide: whether it takes a whole row of the page.
        height_px: of the plot.
        width_px: the least that it can be read at: a narrower window scrolls it.
    """

    id: str
    title: str
    alt: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    note: str = ""
    is_wide: bool = False
    height_px: int = 260
    width_px: int = 0

    def as_dict(self) -> dict[str, Any]:
        """What the page's script needs."""
        return {"id": self.id, "data": self.data, "layout": self.layout}


SIDE_COLOURS = {"base": "@base", "tuned": "@tuned", "model": "@tuned"}
STEP = {"title": {"text": "optimizer step"}, "rangemode": "tozero"}


def learning_curves(curves: Curves, base: dict[str, Any] | None, best_step: int | None) -> list[Figure]:
    """WER, loss, learning rate, gradient norm and throughput by step; those that there are.

    Args:
        curves: of the training.
        base: the base model's rates.
        best_step: whose adapter was published.
    """
    found = [_wer(curves, base, best_step)] if curves.evaluations else []
    for name, title, unit, form in (
        ("loss", "Training loss", "cross-entropy per token", ".4~g"),
        ("lr", "Learning rate", "learning rate", ".3~g"),
        ("grad_norm", "Gradient norm", "norm before clipping", ".4~g"),
        ("clips_per_s", "Throughput", "clips per second", ".4~g"),
    ):
        steps, values = curves.series(name)
        if values:
            found.append(_curve(name, title, unit, form, steps, values, best_step))
    return found


def _curve(
    name: str, title: str, unit: str, form: str, steps: list[int], values: list[float], best_step: int | None
) -> Figure:
    alt = f"{title} by step, from {values[0]:.3g} at step {steps[0]} to {values[-1]:.3g} at step {steps[-1]}."
    line = {
        "type": "scatter",
        "mode": "lines+markers" if len(steps) <= 40 else "lines",
        "x": steps,
        "y": values,
        "line": {"color": "@tuned", "width": 2},
        "marker": {"size": 5},
        "cliponaxis": False,
        "hovertemplate": f"step %{{x}}<br>%{{y:{form}}}<extra></extra>",
    }
    axis: dict[str, Any] = {"title": {"text": unit}, "exponentformat": "e"}
    axis["rangemode"] = "normal" if name == "loss" else "tozero"
    layout = {"xaxis": STEP, "yaxis": axis, "showlegend": False, "shapes": _best(best_step)}
    return Figure(f"curve-{name.replace('_', '-')}", title, alt, [line], layout, height_px=220)


def _best(step: int | None) -> list[dict[str, Any]]:
    """A thin upright line at the step whose adapter was published."""
    if step is None:
        return []
    line = {"color": "@muted", "width": 1, "dash": "dot"}
    return [{"type": "line", "x0": step, "x1": step, "yref": "paper", "y0": 0, "y1": 1, "line": line}]


def _wer(curves: Curves, base: dict[str, Any] | None, best_step: int | None) -> Figure:
    steps = sorted(curves.evaluations)
    data, said = [], []
    for name, label, colour, dash in (("wer", "WER", "@tuned", "solid"), ("cer", "CER", "@accent", "dot")):
        shown = [step for step in steps if name in curves.evaluations[step]]
        values = [curves.evaluations[step][name] for step in shown]
        # The training begins as the base model: B = 0.
        if base and base.get(name) is not None and (not shown or shown[0] > 0):
            shown, values = [0, *shown], [base[name], *values]
        if not values:
            continue
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": label,
                "x": shown,
                "y": values,
                "line": {"color": colour, "width": 2, "dash": dash},
                "cliponaxis": False,
                "marker": {"size": 7, "symbol": "circle" if name == "wer" else "square"},
                "hovertemplate": f"step %{{x}}<br>{label} %{{y:.2%}}<extra></extra>",
            }
        )
        said.append(
            f"{label} from {percent(values[0])} at step {shown[0]} to {percent(values[-1])} at step {shown[-1]}"
        )
    shapes, annotations = _best(best_step), []
    if base and base.get("wer") is not None:
        line = {"color": "@base", "width": 2, "dash": "dash"}
        ends = {"xref": "paper", "x0": 0, "x1": 1, "y0": base["wer"], "y1": base["wer"]}
        shapes = [*shapes, {"type": "line", **ends, "line": line}]
        annotations.append(
            {
                "xref": "paper",
                "x": 0.5,
                "y": base["wer"],
                "xanchor": "center",
                "yanchor": "bottom",
                "text": f"base WER {percent(base['wer'])}",
                "showarrow": False,
                "font": {"color": "@base"},
            }
        )
    best = curves.evaluations.get(best_step, {}) if best_step is not None else {}
    if best_step is not None and "wer" in best:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "cliponaxis": False,
                "name": f"published: step {best_step}",
                "x": [best_step],
                "y": [best["wer"]],
                "marker": {"size": 15, "symbol": "circle-open", "color": "@good", "line": {"width": 3}},
                "hovertemplate": f"published: step {best_step}<br>WER %{{y:.2%}}<extra></extra>",
            }
        )
        said.append(f"the adapter of step {best_step} was published")
    axis = {"title": {"text": "error rate"}, "tickformat": ".0%", "rangemode": "tozero"}
    layout = {"xaxis": STEP, "yaxis": axis, "shapes": shapes, "annotations": annotations}
    return Figure(
        "curve-wer", "Error rate on the validation clips", _sentence(said), data, layout, is_wide=True, height_px=320
    )


def errors_by_length(bins: Sequence[Bin], sides: Sequence[str]) -> Figure:
    """Bars of the error rate by clip length, one for each model."""
    labels = [f"{one.label}<br>n = {count(one.clips)}" for one in bins]
    data = [
        {
            "type": "bar",
            "name": side,
            "x": labels,
            "y": [one.rates[index] for one in bins],
            "customdata": [one.clips for one in bins],
            "marker": {"color": SIDE_COLOURS[side], "pattern": {"shape": "/" if side == "base" else ""}},
            "text": [percent(one.rates[index]) for one in bins],
            "textposition": "outside",
            "textfont": {"size": 12},
            "cliponaxis": False,
            "hovertemplate": f"{side}: WER %{{y:.1%}}, %{{customdata}} clips<extra></extra>",
        }
        for index, side in enumerate(sides)
    ]
    said = [
        f"{one.label}: " + ", ".join(f"{side} {percent(rate)}" for side, rate in zip(sides, one.rates, strict=True))
        for one in bins
    ]
    layout = {
        "barmode": "group",
        "bargap": 0.25,
        "uniformtext": {"minsize": 10, "mode": "hide"},
        "xaxis": {"type": "category"},
        "yaxis": {"title": {"text": "WER"}, "tickformat": ".0%", "rangemode": "tozero"},
        "showlegend": len(sides) > 1,
    }
    alt = f"Word error rate by clip length. {'; '.join(said)}."
    return Figure("errors-by-length", "Error rate by clip length", alt, data, layout, is_wide=True, height_px=320)


def clip_lengths(splits: dict[str, Histogram]) -> Figure:
    """How long the clips of each split are, as shares, so that a small split is seen beside a large one."""
    bin_s = max(one.coarse().bin_s for one in splits.values())
    data, said = [], []
    for name, found in splits.items():
        while found.bin_s < bin_s:
            found = found.coarse(len(found.clips) - 1) if len(found.clips) > 1 else Histogram(bin_s, found.clips)
        total = sum(found.clips) or 1
        middles = [(index + 0.5) * found.bin_s for index in range(len(found.clips))]
        spans = [f"{index * found.bin_s:g} to {(index + 1) * found.bin_s:g} s" for index in range(len(found.clips))]
        data.append(
            {
                "type": "bar",
                "name": {"train": "training", "val": "validation"}.get(name, name),
                "x": middles,
                "y": [clips / total for clips in found.clips],
                "customdata": [[span, clips] for span, clips in zip(spans, found.clips, strict=True)],
                "marker": {
                    "color": {"train": "@accent", "val": "@tuned"}.get(name, "@base"),
                    "pattern": {"shape": "/" if name == "val" else ""},
                },
                "hovertemplate": "%{customdata[0]}: %{customdata[1]} clips, %{y:.1%}<extra>%{fullData.name}</extra>",
            }
        )
        if found.clips:
            most = max(range(len(found.clips)), key=found.clips.__getitem__)
            said.append(f"{name}: {counted(total, 'clip')}, most of {spans[most]}")
    marks = {"tick0": 0, "dtick": bin_s} if max(len(trace["x"]) for trace in data) <= 12 else {}
    layout = {
        "barmode": "group",
        "bargap": 0.15,
        "xaxis": {"title": {"text": "length of a clip in seconds"}, "rangemode": "tozero"} | marks,
        "yaxis": {"title": {"text": "share of clips"}, "tickformat": ".0%"},
        "showlegend": True,
    }
    return Figure("clip-lengths", "Lengths", f"Lengths of clips. {_sentence(said)}", data, layout, height_px=260)


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
