"""The guard's result in words: for the model card and the summary."""

from __future__ import annotations

from typing import Any

from jobs.guard.faults import BAD_TIMESTAMPS, LOOPS, TEXT_ON_SILENCE
from service.spec.counted import counted
from service.spec.languages import LANGUAGES

LABELS = {TEXT_ON_SILENCE: "text on silence", LOOPS: "loops", BAD_TIMESTAMPS: "bad timestamps"}


def card_lines(metrics: dict[str, Any]) -> list[str]:
    """The card's section on the guard; nothing where there was none."""
    if not (result := metrics.get("guard")):
        return []
    base, tuned = result["base"], result["tuned"]
    languages = tuned["languages"] if len(tuned["languages"]) > 1 else {}
    return [
        "## What it must not forget",
        "",
        f"On {counted(result['utterances'], 'clip')} of other kinds, transcribed with timestamps:",
        "",
        "| | base | tuned |",
        "|---|---:|---:|",
        f"| WER | {_percent(base['wer'])} | {_percent(tuned['wer'])} |",
        *(
            f"| WER, {LANGUAGES[code].capitalize()} | {_percent(base['languages'][code])} | {_percent(wer)} |"
            for code, wer in languages.items()
        ),
        *(f"| clips with {label} | {base[kind]} | {tuned[kind]} |" for kind, label in LABELS.items()),
        "",
    ]


def summary_fact(result: dict[str, Any]) -> str:
    """One line for the summary."""
    base, tuned = result["base"], result["tuned"]
    counts = ", ".join(f"{label} {base[kind]} -> {tuned[kind]}" for kind, label in LABELS.items())
    held = "worse than the base" if result["reasons"] else "no worse than the base"
    change = f"WER {_percent(base['wer'])} -> {_percent(tuned['wer'])}"
    return f"{held} on {counted(result['utterances'], 'clip')}  ({change}; {counts})"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"
