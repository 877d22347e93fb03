"""The tuned model is measured by what the base model can do: only what it newly gets wrong counts against it."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from jobs.guard.faults import KINDS
from jobs.guard.hear import Heard, Piece
from jobs.guard.verdict import SHOWN, Checked, check, summary, verdict
from jobs.guard.words import card_lines, summary_fact
from jobs.publish import promotion_reasons
from jobs.score import Scorer
from service.spec.guard import GuardConfig

SCORER = Scorer(None)
SAID = "please open the door and the window"
LOOP = "light " * 10


def clip(
    heard: str,
    reference: str = SAID,
    *,
    language: str = "en",
    end_s: float | None = 2.0,
    no_speech: bool = False,
    stuck: bool = False,
) -> Checked:
    """A clip of 2 s in which a model heard a text."""
    record = {"path": "clip.wav", "text": "" if no_speech else reference, "language": language, "duration_s": 2.0}
    found = Heard(0, (Piece(0.0, end_s, f" {heard}"),) if heard else (), stuck)
    return check(record | {"no_speech": no_speech}, found, SCORER)


def judged(base: list[Checked], tuned: list[Checked], **settings: Any) -> dict[str, Any]:
    return verdict(base, tuned, GuardConfig(csv="guard.csv", **settings))


CHECKED = {
    "as it was said": (clip(SAID), set()),
    "a wrong word": (clip("please open the door and a widow"), set()),
    "nothing heard": (clip(""), set()),
    "a loop": (clip(LOOP), {"loops"}),
    "what was said in a loop": (clip(LOOP, LOOP), set()),
    "no end": (clip(SAID, end_s=None), {"bad_timestamps"}),
    "an end far off": (clip(SAID, end_s=29.0), {"bad_timestamps"}),
    "stuck": (clip("", stuck=True), {"bad_timestamps"}),
    "a loop without end": (clip(LOOP, end_s=None), {"loops", "bad_timestamps"}),
    "silence on silence": (clip("", no_speech=True), set()),
    "text on silence": (clip("you", no_speech=True), {"text_on_silence"}),
    "dots on silence": (clip("...", no_speech=True), set()),
    "a note on silence": (clip("(music) [BLANK_AUDIO]", no_speech=True), set()),
    "a loop on silence": (clip(LOOP, no_speech=True, end_s=None), {"text_on_silence"}),
    "characters on silence": (clip("謝謝", no_speech=True, language="zh"), {"text_on_silence"}),
}


@pytest.mark.parametrize(("found", "kinds"), CHECKED.values(), ids=CHECKED)
def test_each_fault_of_a_clip_is_named(found: Checked, kinds: set[str]) -> None:
    assert set(found.faults) == kinds
    line = found.as_dict()
    assert line["faults"] == found.faults
    assert line["no_speech"] is found.no_speech
    assert [text for _, _, text in line["segments"]] == ([found.heard.text] if found.heard.text else [])


def test_the_summary_leaves_silence_out_of_the_rates_and_counts_faults() -> None:
    found = summary([clip(SAID), clip(LOOP, end_s=None), clip("you", no_speech=True), clip("", no_speech=True)])
    assert found["languages"] == {"en": found["wer"]}
    assert found["wer"] == pytest.approx(10 / 14)
    assert {kind: found[kind] for kind in KINDS} == {"text_on_silence": 1, "loops": 1, "bad_timestamps": 1}


def test_of_silence_alone_there_is_no_rate_and_it_is_judged_all_the_same() -> None:
    result = judged([clip("", no_speech=True)], [clip("you", no_speech=True)])
    assert result["base"]["wer"] is result["tuned"]["wer"] is None
    assert len(result["reasons"]) == 1
    assert "WER - -> -; text on silence 0 -> 1" in summary_fact(result)


def test_the_same_transcripts_are_no_regression_whatever_they_are() -> None:
    clips = [found for found, _ in CHECKED.values()]
    result = judged(clips, clips, max_wer_increase=0)
    assert (result["reasons"], result["regressions"], set(result["regressed"].values())) == ([], [], {0})
    assert result["utterances"] == len(clips)


FAILING = {
    "text_on_silence": (clip("", no_speech=True), clip("thank you", no_speech=True), "writes text where nothing"),
    "loops": (clip(SAID), clip(f"{SAID} {LOOP}"), "repeats itself in a loop"),
    "bad_timestamps": (clip(SAID), clip(SAID, end_s=None), "gives timestamps that go back, lie beyond"),
}


@pytest.mark.parametrize(("good", "bad", "says"), FAILING.values(), ids=FAILING)
def test_a_clip_counts_where_the_base_did_not_fail(good: Checked, bad: Checked, says: str) -> None:
    loose = {"max_wer_increase": 1}
    (kind,) = bad.faults
    refused = judged([good, good], [good, bad], **loose)
    assert len(refused["reasons"]) == 1
    assert refused["reasons"][0].startswith(f"on 1 clip of the guard, and not before, it {says}")
    assert refused["regressed"][kind] == sum(refused["regressed"].values()) == 1
    (shown,) = refused["regressions"]
    assert (shown["path"], shown["kind"], shown["text"]) == ("clip.wav", kind, bad.utterance.hypothesis)
    assert shown["detail"] == bad.faults[kind]
    assert "on 2 clips of the guard" in judged([good] * 4, [bad, bad, good, good], **loose)["reasons"][0]
    for base in ([bad, bad], [bad, good]):
        assert judged(base, base, **loose)["reasons"] == []
    assert judged([bad, good], [bad, good], **loose)["reasons"] == []
    assert judged([bad], [good], **loose)["reasons"] == [], "what has become better is no reason against it"
    assert judged([bad, good], [good, bad], **loose)["reasons"] != [], "one mended does not make up for another"


@pytest.mark.setting("guard.max_regressions")
def test_as_many_clips_may_fail_anew_as_the_spec_allows() -> None:
    good, bad = clip(SAID), clip(LOOP, end_s=None)  # two faults, but one clip
    base, tuned = [good, good, good], [bad, bad, good]
    strict, loose = (judged(base, tuned, max_wer_increase=1, max_regressions=allowed) for allowed in (1, 2))
    assert len(strict["reasons"]) == 2
    assert loose["reasons"] == []
    assert len(loose["regressions"]) == 4, "they are listed even so"


def test_many_regressions_are_counted_and_the_first_ones_shown() -> None:
    result = judged([clip(SAID)] * 30, [clip(SAID, end_s=None)] * 30)
    assert len(result["regressions"]) == SHOWN
    assert result["regressed"]["bad_timestamps"] == 30


@pytest.mark.setting("guard.max_wer_increase")
@pytest.mark.parametrize(("limit", "refused"), [(0.0, True), (0.14, True), (0.15, False)])
def test_the_wer_may_rise_by_the_limit(limit: float, *, refused: bool) -> None:
    result = judged([clip(SAID)], [clip("please open the door and the widow")], max_wer_increase=limit)  # 1 of 7
    assert bool(result["reasons"]) is refused
    for reason in result["reasons"]:
        assert "its WER on the guard's clips, 14.3%, is above the base model's, 0.0%, by more than" in reason
        assert f"guard.max_wer_increase ({limit:g})" in reason


def test_a_language_that_is_lost_is_seen_among_many_that_are_kept() -> None:
    spanish = clip("abre la puerta", "abre la puerta", language="es")
    lost = clip("a breath la porter", "abre la puerta", language="es")
    result = judged([clip(SAID)] * 99 + [spanish], [clip(SAID)] * 99 + [lost])
    assert result["tuned"]["wer"] < 0.02
    assert len(result["reasons"]) == 1
    assert "its WER in Spanish on the guard's clips, 100.0%" in result["reasons"][0]


def test_its_reasons_stand_beside_that_of_the_validation_split() -> None:
    metrics: dict[str, Any] = {"base": {"wer": 0.5}, "tuned": {"wer": 0.1}}
    assert promotion_reasons(metrics) == []
    assert promotion_reasons(metrics | {"guard": judged([clip(SAID)], [clip(SAID)])}) == []
    forgot = {"guard": judged([clip(SAID)], [clip(LOOP)])}
    assert promotion_reasons(metrics | forgot) == forgot["guard"]["reasons"]
    worse = metrics | {"tuned": {"wer": 0.6}}
    refused = {"artifacts": {"hf": {"refused": "it says nothing"}, "openai": {"refused": "nor does it"}}}
    assert promotion_reasons(metrics | refused) == ["its merged checkpoint was refused: it says nothing"]
    assert promotion_reasons(worse | forgot) == [*promotion_reasons(worse), *forgot["guard"]["reasons"]]


def test_clips_that_were_trained_on_prove_nothing() -> None:
    metrics: dict[str, Any] = {"base": {"wer": 0.5}, "tuned": {"wer": 0.1, "utterances": 80}}
    assert promotion_reasons(metrics, clips_in_both=0) == []
    (reason,) = promotion_reasons(metrics, clips_in_both=3)
    assert reason == "its WER says little: 3 of the 80 validation clips were trained on"


def test_card_and_summary_tell_of_it_and_say_nothing_without_a_guard() -> None:
    spanish = clip("abre la puerta", "abre la puerta", language="es")
    silent, wordy = clip("", no_speech=True), clip("you", no_speech=True)
    result = judged([clip(SAID), spanish, silent], [clip(LOOP), spanish, wordy])
    text = "\n".join(card_lines({"guard": result}))
    assert "On 3 clips of other kinds" in text
    assert "| WER | 0.0% | 100.0% |" in text
    assert "| WER, Spanish | 0.0% | 0.0% |" in text
    assert "| clips with text on silence | 0 | 1 |" in text
    assert "| clips with loops | 0 | 1 |" in text
    assert card_lines({}) == []
    console = Console(width=200)
    with console.capture() as captured:
        console.print(summary_fact(result))
    assert captured.get().startswith("worse than the base on 3 clips  (WER 0.0% -> 100.0%; text on silence 0 -> 1")
    assert summary_fact(judged([silent], [silent])).startswith("no worse than the base on 1 clip ")
