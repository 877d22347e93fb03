"""The report's figures: curves of runs that were resumed, lengths, paired differences, and plots that plotly takes."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from plotly.graph_objects import Figure as PlotlyFigure
from reports import BASE, TUNED, make_search, many_utterances, training_events, utterance

from service.report import words
from service.report.curves import SHOWN_STEPS, read_curves
from service.report.figures import Figure, clip_lengths, errors_by_length, learning_curves
from service.report.lengths import Histogram, by_length, histogram, histogram_of
from service.report.lines import Line, join, read_lines
from service.report.paired import MANY, difference
from service.report.search_figures import ceiling, parallel_coordinates, search_figures
from service.trials import Evaluation, Search, Trial


def lines(records: Any) -> list[Line]:
    return read_lines("".join(json.dumps(record) + "\n" for record in records).encode())


def events(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def step(number: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss, "lr": 0.1, "grad_norm": 1.0, "clips_per_s": 9.0} | more


def test_of_a_resumed_run_the_later_steps_count() -> None:
    curves = read_curves(
        events(
            step(1, 4.0),
            step(2, 3.0),
            step(3, 9.0),
            {"event": "evaluation", "step": 2, "wer": 0.9, "cer": 0.5},
            {"event": "model", "resumed_from_step": 1},
            step(2, 2.5),
            {"event": "evaluation", "step": 2, "wer": 0.4, "cer": 0.2},
            {"event": "evaluation", "what": "tuned", "wer": 0.1, "cer": 0.1},
        )
    )
    assert curves.series("loss") == ([1, 2, 3], [4.0, 2.5, 9.0])
    assert curves.evaluations == {2: {"wer": 0.4, "cer": 0.2}}
    assert curves.resumed == [1]


def test_in_a_search_only_the_winners_events_belong_to_the_curve() -> None:
    content = events(step(1, 4.0, trial="t001"), step(1, 7.0, trial="t002"), step(2, 3.0))
    assert read_curves(content, "t001").series("loss") == ([1, 2], [4.0, 3.0])
    assert read_curves(content).series("loss") == ([2], [3.0])


def test_a_last_line_that_is_being_written_is_left_out_and_another_is_a_fault() -> None:
    assert read_curves(events(step(1, 4.0)) + b'{"event": "st').series("loss") == ([1], [4.0])
    with pytest.raises(ValueError, match="Unterminated"):
        read_curves(b'{"event": "st\n' + events(step(1, 4.0)))


def test_norms_that_overflowed_are_left_out() -> None:
    curves = read_curves(events(step(1, 4.0, grad_norm=None), step(2, 3.0)))
    assert curves.series("grad_norm") == ([2], [1.0])


def test_a_long_training_is_drawn_by_means() -> None:
    curves = read_curves(events(*(step(number, float(number)) for number in range(1, 2 * SHOWN_STEPS + 1))))
    steps, values = curves.series("loss")
    assert len(steps) == SHOWN_STEPS
    assert curves.is_thinned
    assert (steps[0], values[0]) == (2, 1.5)


def test_lengths_are_filed_in_few_bins_and_their_clips_add_up() -> None:
    clips = [(line,) for line in lines(many_utterances(300))]
    bins = by_length(clips)
    assert sum(one.clips for one in bins) == 300
    assert 3 <= len(bins) <= 8
    assert bins[0].label == "0–5 s"
    short = [line for (line,) in clips if line.duration_s < 5]
    assert bins[0].rates[0] == pytest.approx(sum(x.errors for x in short) / sum(x.words for x in short))


def test_a_recording_beyond_all_bins_is_in_the_last() -> None:
    found = by_length([(line,) for line in lines([utterance("a", "x", "x", duration_s=9000.0)])])
    assert [(one.label, one.clips) for one in found] == [("over 2100 s", 1)]


def test_histograms_of_two_widths_are_brought_to_one() -> None:
    long, short = Histogram(0.5, [1] * 60), Histogram(0.5, [0, 4])
    found = clip_lengths({"train": long, "val": short})
    assert [trace["x"][0] for trace in found.data] == [1.0, 1.0]
    assert all(sum(trace["y"]) == pytest.approx(1) for trace in found.data)
    assert sum(count for _, count in found.data[0]["customdata"]) == 60
    assert histogram({"rows": 3}) is None
    assert histogram_of(lines(BASE)) == Histogram(0.5, [0, 0, 1, 0, 1, 0, 1])


def test_the_interval_of_a_difference_holds_the_truth() -> None:
    """Of 60 pairs of models whose true difference is known, about 95 % of the intervals must hold it."""
    draw, held = random.Random(1), 0
    for seed in range(60):
        pairs = []
        for _ in range(80):
            hard = draw.random()  # the same clip is hard for both
            errors = [sum(draw.random() < hard * rate for _ in range(10)) for rate in (0.6, 0.4)]
            old, new = (Line("a", "en", 1.0, "", "", count, 10) for count in errors)
            pairs.append((old, new))
        found = difference(pairs, seed)
        assert found is not None
        held += found.bounds[0] <= -0.1 <= found.bounds[1]
    assert 52 <= held <= 60


def test_of_many_clips_the_interval_is_that_of_the_resamples_in_a_moment() -> None:
    pairs = [(one[0], one[1]) for one in join([lines(many_utterances(MANY, error_rate=rate)) for rate in (0.3, 0.2)])]
    found, resampled = difference(pairs), difference(pairs[:-1])
    assert found is not None
    assert resampled is not None
    assert found.bounds == pytest.approx(resampled.bounds, abs=3e-4)
    assert found.bounds[1] - found.bounds[0] > 3e-3


def test_a_difference_counts_clips_and_words() -> None:
    found = difference([(one[0], one[1]) for one in join([lines(BASE), lines(TUNED)])])
    assert found is not None
    assert (found.clips, found.better, found.worse) == (3, 2, 1)
    assert found.before == pytest.approx(5 / 11)
    assert found.rate == pytest.approx((4 - 5) / 11)
    assert not found.is_clear
    assert difference([]) is None


def figures() -> list[Figure]:
    sides = [lines(BASE), lines(TUNED)]
    curves = read_curves(events(*training_events()))
    return [
        *learning_curves(curves, {"wer": 0.6, "cer": 0.3}, 30),
        errors_by_length(by_length(join(sides)), ["base", "tuned"]),
        clip_lengths({"train": Histogram(0.5, [1, 2]), "val": Histogram(0.5, [3])}),
        *search_figures(make_search()),
        *search_figures(make_search(metric="loss", trials=4, failed=1)),
    ]


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: figure.id)
def test_plotly_knows_every_key_of_a_figure_and_there_is_something_in_it(figure: Figure) -> None:
    """plotly's own schema refuses unknown keys and wrong values; colours are the page's, so any will do here."""
    plain = _without_names(json.loads(json.dumps(figure.as_dict(), allow_nan=False)))
    PlotlyFigure(data=plain["data"], layout=plain["layout"])
    assert all(len(trace["x"]) == len(trace["y"]) > 0 for trace in plain["data"])
    assert len(figure.alt) > 30
    assert figure.alt.endswith(".")


def _without_names(value: Any) -> Any:
    if isinstance(value, str):
        return "#808080" if value.startswith("@") else value
    if isinstance(value, list):
        return [_without_names(one) for one in value]
    return {key: _without_names(one) for key, one in value.items()} if isinstance(value, dict) else value


def test_the_curve_begins_at_the_base_and_marks_what_was_published() -> None:
    curves = read_curves(events(*training_events()))
    wer = learning_curves(curves, {"wer": 0.6, "cer": 0.3}, 30)[0]
    assert wer.data[0]["x"][0] == 0
    assert wer.data[0]["y"][0] == 0.6
    published = wer.data[-1]
    assert (published["x"], published["y"]) == ([30], [pytest.approx(0.3)])
    assert wer.layout["annotations"][0]["text"] == "base WER 60.0%"
    assert "the adapter of step 30 was published" in wer.alt


def test_parallel_coordinates_place_rates_by_magnitude_and_say_what_is_not_set() -> None:
    search = make_search()
    found = parallel_coordinates(search)
    assert found is not None
    titles = found.layout["xaxis"]["ticktext"]
    assert [title.replace("<br>", "") for title in titles] == [
        "lr", "lora_r", "use_dora", "lora_target_modules", "lora_dropout", "WER",
    ]  # fmt: skip
    by_id = {trial.id: trial for trial in search.trials}
    scored = [trial for trial in search.trials[1:] if trial.score is not None]
    assert len(found.data) == len(scored) == 38
    low = min(scored, key=lambda trial: trial.settings["training.lr"])
    high = max(scored, key=lambda trial: trial.settings["training.lr"])
    middle = (low.settings["training.lr"] * high.settings["training.lr"]) ** 0.5
    for trace in found.data:
        assert all(0 <= place <= 1 for place in trace["y"])
        assert (trace["y"][0] < 0.5) == (by_id[trace["meta"]].settings["training.lr"] < middle)
    written = {note["text"] for note in found.layout["annotations"]}
    assert {"on", "off", "not set", "0.05"} <= written
    assert found.data[-1]["meta"] == search.winner, "the winner is drawn last, over the others"


def test_a_trial_that_has_come_apart_does_not_squash_the_others() -> None:
    def row(name: str, origin: str, score: float, rank: int = 4) -> Trial:
        evaluation = Evaluation(number=1, step=9, seed=1, wer=score, score=score, seconds=5.0)
        facts: dict[str, Any] = {"trainable_parameters": 1000 * rank, "seconds": 9.0, "evaluations": [evaluation]}
        return Trial(
            id=name, origin=origin, settings={} if origin == "untuned" else {"lora_r": rank}, status="finished",
            score=score, **facts,
        )  # fmt: skip

    rows = [row("untuned", "untuned", 0.6), row("t000", "defaults", 0.4), row("t001", "tpe", 0.3, 8)]
    common: dict[str, Any] = {"metric": "wer", "sampler": "tpe", "scheduler": "asha", "seed": 1, "repeats": 1}
    tame = Search(**common, evaluations=1, planned=3, trials=rows)
    wild = tame.model_copy(update={"trials": [*rows, row("t002", "tpe", 3.7, 16)]})
    assert (ceiling(tame), ceiling(wild)) == (math.inf, pytest.approx(0.66))
    for figure in search_figures(wild)[1:]:
        assert figure.layout["yaxis"]["range"] == [0, pytest.approx(0.66)]
        assert "Above the scale: t002." in figure.note
    lines = {trace["name"]: trace["y"][-1] for trace in search_figures(wild)[0].data}
    assert (lines["t001"], lines["t002"]) == (0, 1)
    assert 0.2 < lines["t000"] < 0.4, "on the scale of those that came out well"
    assert "over 66.0%" in [note["text"] for note in search_figures(wild)[0].layout["annotations"]]
    assert all("range" not in figure.layout["yaxis"] for figure in search_figures(tame)[1:])


def test_a_setting_that_reads_like_html_is_written_out() -> None:
    search = make_search(trials=6, failed=0)
    trials = [
        trial.model_copy(
            update={"settings": trial.settings | {"training.x": f'<a href="javascript:alert(1)">{index}</a>'}}
        )
        for index, trial in enumerate(search.trials)
    ]
    found = parallel_coordinates(search.model_copy(update={"trials": trials}))
    assert found is not None
    assert "<a href" not in json.dumps([found.data, found.layout])


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (words.percent(0.0631), "6.3%"),
        (words.percent(None), "–"),
        (words.points(-0.532), "−53.2"),
        (words.points(0.01), "+1.0"),
        (words.clock(3725), "1:02:05"),
        (words.hours(0.15), "9.0 min"),
        (words.hours(1.25), "1.2 h"),
        (words.counted(1, "clip"), "1 clip"),
        (words.counted(1.0, "CPU"), "1 CPU"),
        (words.counted(0.5, "CPU"), "0.5 CPUs"),
        (words.counted(1234, "pass", "passes"), "1,234 passes"),
        (words.setting(["q", "v"]), "q, v"),
        (words.setting({"q": 4}), "q: 4"),
        (words.setting(False), "off"),
        (words.language("nl"), "Dutch"),
        (words.printable("a\x1b[31m\x9b\u202eb\n"), "a\\x1b[31m\\x9b\\u202eb\\n"),
        (words.printable("é 窓 [bold]"), "é 窓 [bold]"),
    ],
)
def test_figures_are_written_for_people(written: str, expected: str) -> None:
    assert written == expected
