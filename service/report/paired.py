"""The difference of two word error rates on the same clips, with its interval."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.report.lines import Line
from service.report.words import points

RESAMPLES = 1000
MANY = 3_000
"""Clips from which on the interval is that of the normal distribution, which the resamples' has come to by then."""


@dataclass(frozen=True)
class Difference:
    """What a second model does differently on the clips of a first one.

    Attributes:
        clips: that both have heard.
        rate: the second's word error rate less the first's.
        bounds: the 95 % interval of that.
        better: clips with fewer errors.
        worse: clips with more.
    """

    clips: int
    before: float
    after: float
    bounds: tuple[float, float]
    better: int
    worse: int

    @property
    def rate(self) -> float:
        """How much higher the second error rate is; below 0: it is better."""
        return self.after - self.before

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return _leaves_out_0(self.bounds)

    def as_dict(self) -> dict[str, Any]:
        """As metrics.json has it."""
        return {"wer": self.rate, "wer_interval": list(self.bounds), "better": self.better, "worse": self.worse}


def in_words(found: dict[str, Any]) -> str:
    """What `Difference.as_dict` gave: `-4.0 points of WER (95 % interval -6.1 to -1.9, paired by clip)`, and whether
    that may be chance."""
    low, high = found["wer_interval"]
    chance = "" if _leaves_out_0((low, high)) else ", which may be chance"
    return (
        f"{points(found['wer'])} points of WER (95 % interval {points(low)} to {points(high)}, paired by clip){chance}"
    )


def difference(pairs: Sequence[tuple[Line, Line]], seed: int = 0) -> Difference | None:
    """Compare two models on the same clips; None: there are no clips, or no words in them.

    The interval is the percentile interval of a paired bootstrap: clips are drawn with replacement, the same for both
    models, and each draw gives one difference (Bisani and Ney, 2004). It is narrower than what the two models' own
    intervals suggest, since a clip that is hard is hard for both. Of MANY clips or more it is computed from the
    variance of the clips' differences, in a moment rather than in minutes.

    Args:
        pairs: each clip as both have heard it.
        seed: of the draws.
    """
    words = sum(old.words for old, _ in pairs)
    if not words:
        return None
    edits = [(new.errors - old.errors, old.words) for old, new in pairs]
    bounds = _normal(edits) if len(edits) >= MANY else _bootstrap(edits, seed)
    return Difference(
        clips=len(pairs),
        before=sum(old.errors for old, _ in pairs) / words,
        after=sum(new.errors for _, new in pairs) / words,
        bounds=bounds,
        better=sum(new.errors < old.errors for old, new in pairs),
        worse=sum(new.errors > old.errors for old, new in pairs),
    )


def _leaves_out_0(bounds: tuple[float, float]) -> bool:
    return bounds[0] > 0 or bounds[1] < 0


Edits = Sequence[tuple[int, int]]
"""Of every clip: errors of the second model less those of the first, and words."""


def _bootstrap(edits: Edits, seed: int) -> tuple[float, float]:
    draw = random.Random(seed)
    rates = []
    for _ in range(RESAMPLES):
        drawn = draw.choices(edits, k=len(edits))
        rates.append(sum(one[0] for one in drawn) / max(1, sum(one[1] for one in drawn)))
    rates.sort()
    return _percentile(rates, 0.025), _percentile(rates, 0.975)


def _normal(edits: Edits) -> tuple[float, float]:
    """The interval of a ratio of two sums over clips, by the delta method."""
    words = sum(length for _, length in edits)
    rate = sum(change for change, _ in edits) / words
    error = math.sqrt(sum((change - rate * length) ** 2 for change, length in edits)) / words
    return rate - 1.96 * error, rate + 1.96 * error


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
