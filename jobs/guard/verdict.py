"""Base and tuned model side by side on the guard's clips: where the tuned one has become worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jobs.guard.faults import BAD_TIMESTAMPS, KINDS, LOOPS, TEXT_ON_SILENCE, is_loop, timestamp_problem
from jobs.guard.hear import Heard
from jobs.score import Scorer, Utterance, summarise
from service.spec.counted import counted
from service.spec.guard import GuardConfig
from service.spec.languages import LANGUAGES

SHOWN = 20
"""Regressions that metrics.json holds; evaluation/ has every clip."""


@dataclass(frozen=True)
class Checked:
    """A clip, what one model heard in it, and what is wrong with that: {kind: how}."""

    utterance: Utterance
    no_speech: bool
    heard: Heard
    faults: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """A line of the utterances' file."""
        segments = [[piece.start_s, piece.end_s, piece.text.strip()] for piece in self.heard.pieces]
        return self.utterance.as_dict() | {"no_speech": self.no_speech, "segments": segments, "faults": self.faults}


def check(record: dict[str, Any], heard: Heard, scorer: Scorer) -> Checked:
    """Score one row's transcript, and look for the faults that the score does not tell of.

    A row that is marked as `no_speech` must have no text but such as the normaliser takes out: (music), dots. What its
    transcript repeats, or when, is then of no matter. A repetition that the reference has too is no loop.
    """
    utterance = scorer.score(record, heard.text)
    language, faults = utterance.language, dict[str, str]()
    if record["no_speech"]:
        words = [word for word in scorer.normalise(heard.text, language).split() if any(map(str.isalnum, word))]
        if words:
            faults[TEXT_ON_SILENCE] = counted(len(words), "word")
        return Checked(utterance, True, heard, faults)
    if is_loop(heard.text, language) and not is_loop(utterance.reference, language):
        faults[LOOPS] = KINDS[LOOPS]
    problem = timestamp_problem(heard.pieces, utterance.duration_s)
    if heard.stuck:
        problem = "timestamps that never lead to the clip's end"
    if problem:
        faults[BAD_TIMESTAMPS] = problem
    return Checked(utterance, False, heard, faults)


def summary(clips: list[Checked]) -> dict[str, Any]:
    """One model's figures: WER over the clips with speech (None: there are none) and per language, faults by kind."""
    spoken = [clip.utterance for clip in clips if not clip.no_speech]
    rates = summarise(spoken, bootstrap=0) if spoken else {"wer": None, "languages": {}}
    counts = Counter(kind for clip in clips for kind in clip.faults)
    languages = {code: values["wer"] for code, values in rates["languages"].items()}
    return {"wer": rates["wer"], "languages": languages} | {kind: counts[kind] for kind in KINDS}


def verdict(base: list[Checked], tuned: list[Checked], settings: GuardConfig) -> dict[str, Any]:
    """Both models' figures, and the reasons against the tuned one.

    Args:
        base: the base model's clips.
        tuned: the tuned model's, in the same order.
        settings: how much worse it may be.

    Returns:
        {"utterances", "base", "tuned": see `summary`, "regressed": clips that failed anew, by kind, "regressions": the
        first of them as {"path", "kind", "detail", "text"}, "reasons"}.
    """
    before, after = summary(base), summary(tuned)
    anew = [
        (clip, kind)
        for old, clip in zip(base, tuned, strict=True)
        for kind in clip.faults
        if kind not in old.faults  # what the base cannot do either is no loss
    ]
    worse = sum(not clip.faults.keys() <= old.faults.keys() for old, clip in zip(base, tuned, strict=True))
    counts = Counter(kind for _, kind in anew)
    reasons = list(_wer_reasons(before, after, settings.max_wer_increase))
    if worse > settings.max_regressions:
        reasons += [f"{_prefix(count)} {words}" for kind, words in KINDS.items() if (count := counts[kind])]
    return {
        "utterances": len(tuned),
        "base": before,
        "tuned": after,
        "regressed": {kind: counts[kind] for kind in KINDS},
        "regressions": [
            {
                "path": clip.utterance.path,
                "kind": kind,
                "detail": clip.faults[kind],
                "text": clip.utterance.hypothesis,
            }
            for clip, kind in anew[:SHOWN]
        ],
        "reasons": reasons,
    }


def _prefix(count: int) -> str:
    return f"on {counted(count, 'clip')} of the guard, and not before, it"


def _wer_reasons(before: dict[str, Any], after: dict[str, Any], limit: float) -> Iterable[str]:
    rates = [("", before["wer"], after["wer"])]
    rates += [
        (f" in {LANGUAGES[code].capitalize()}", before["languages"][code], wer)
        for code, wer in after["languages"].items()
        if len(after["languages"]) > 1
    ]
    for where, old, new in rates:
        if old is not None and new - old > limit + 1e-9:
            yield (
                f"its WER{where} on the guard's clips, {new:.1%}, is above the base model's, {old:.1%}, by more than "
                f"guard.max_wer_increase ({limit:g})"
            )
