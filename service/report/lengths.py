"""Clips by their length, and how a model fares with short and long ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.report.lines import Line, rate

WIDTHS_S = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
MOST_BINS = 8


@dataclass(frozen=True)
class Bin:
    """Clips of about one length.

    Attributes:
        label: `2–4 s`.
        clips: how many there are.
        rates: word error rate of each model.
    """

    label: str
    clips: int
    rates: tuple[float | None, ...]


def by_length(clips: Sequence[tuple[Line, ...]]) -> list[Bin]:
    """Error rates by length, in at most MOST_BINS bins of equal width; empty ones are left out.

    Args:
        clips: each as every model has heard it.
    """
    if not clips:
        return []
    longest = max(one[0].duration_s for one in clips)
    width = next((width for width in WIDTHS_S if longest <= width * MOST_BINS), WIDTHS_S[-1])
    filed: dict[int, list[tuple[Line, ...]]] = {}
    for one in clips:
        filed.setdefault(min(int(one[0].duration_s / width), MOST_BINS - 1), []).append(one)
    return [
        Bin(
            label=f"{index * width:g}–{(index + 1) * width:g} s"
            if (index + 1) * width >= longest or index < MOST_BINS - 1
            else f"over {index * width:g} s",
            clips=len(found),
            rates=tuple(rate(side) for side in zip(*found, strict=True)),
        )
        for index, found in sorted(filed.items())
    ]


@dataclass(frozen=True)
class Histogram:
    """Clips of a split by length, in bins of `bin_s` seconds from 0 on."""

    bin_s: float
    clips: list[int]

    def coarse(self, most: int = 24) -> Histogram:
        """The same in at most so many bins, joined two by two."""
        found = self
        while len(found.clips) > most:
            clips = [*found.clips, *([0] if len(found.clips) % 2 else [])]
            pairs = [clips[index] + clips[index + 1] for index in range(0, len(clips), 2)]
            found = Histogram(found.bin_s * 2, pairs)
        return found


def histogram(split: dict[str, Any]) -> Histogram | None:
    """Of a split's entry in manifest.json; None: the run is of an earlier version."""
    lengths = split.get("lengths")
    return Histogram(float(lengths["bin_s"]), list(lengths["clips"])) if lengths else None


def histogram_of(lines: Sequence[Line], bin_s: float = 0.5) -> Histogram | None:
    """Of utterances; None: there are none."""
    if not lines:
        return None
    bins = [int(line.duration_s / bin_s) for line in lines]
    clips = [0] * (max(bins) + 1)
    for index in bins:
        clips[index] += 1
    return Histogram(bin_s, clips)
