"""What events.jsonl says of a training, step by step, and what the job has warned of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from service.artifacts import REPORT

MEASURED = ("loss", "lr", "grad_norm", "clips_per_s")
OLD_WARNING = "[yellow]warning[/yellow]: "
"""How a warning began before events had a level."""
"""How a notice begins that is a warning, in the markup of the terminal."""

SHOWN_STEPS = 1_500
"""Steps that are drawn: of a longer training the means of as many stretches."""


@dataclass
class Curves:
    """The training that led to the published model; step -> values.

    Attributes:
        steps: of every logged step MEASURED, None where it was not known.
        evaluations: of every evaluation `wer` and `cer`.
        resumed: the steps from which the training went on after it had ended early.
        warnings: what the job has warned of, each once.
    """

    steps: dict[int, dict[str, float | None]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps, and one of MEASURED at each of them, thinned to what can be seen."""
        found = [(step, value) for step, values in sorted(self.steps.items()) if (value := values[name]) is not None]
        size = -(-len(found) // SHOWN_STEPS) or 1
        parts = [found[start : start + size] for start in range(0, len(found), size)]
        return [part[-1][0] for part in parts], [sum(value for _, value in part) / len(part) for part in parts]

    @property
    def is_thinned(self) -> bool:
        """Whether means of several logged steps are drawn."""
        return len(self.steps) > SHOWN_STEPS


def read_events(content: bytes) -> Iterator[dict[str, Any]]:
    """The events of a file; a last line that is still being written is left out."""
    lines = content.decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise
        if isinstance(event, dict):
            yield event


def read_curves(content: bytes, winner: str | None = None) -> Curves:
    """The curves of the model that was published.

    A run that was resumed has made some steps twice: the later ones count.

    Args:
        content: of events.jsonl.
        winner: in a search, the trial whose events (with its id as `trial`) are the beginning of the same curve.

    Raises:
        ValueError: a line is no JSON.
    """
    curves = Curves()
    for event in read_events(content):
        if event.get("trial") not in (None, winner):
            continue
        kind, step = event.get("event"), event.get("step")
        if kind == "step" and isinstance(step, int):
            curves.steps[step] = {name: _number(event.get(name)) for name in MEASURED}
        elif kind == "evaluation" and isinstance(step, int):
            rates = {name: found for name in ("wer", "cer") if (found := _number(event.get(name))) is not None}
            if rates:
                curves.evaluations[step] = rates
        elif kind == "model" and event.get("resumed_from_step"):
            curves.resumed.append(event["resumed_from_step"])
        elif kind == "notice" and (text := _warning(event)) and text not in curves.warnings:
            curves.warnings.append(text)
    return curves


def _warning(event: dict[str, Any]) -> str | None:
    """The words of a warning; None: it is none, or of a report that could not be made, which this one now is."""
    text = str(event.get("text"))
    if text.startswith(OLD_WARNING):
        text = text.removeprefix(OLD_WARNING).replace("\\[", "[")
    elif event.get("level") != "warning":
        return None
    return None if text.startswith(f"there is no {REPORT}") else text


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
