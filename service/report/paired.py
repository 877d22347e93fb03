"""The difference of two word error rates on the same clips, with its interval."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from service.report.lines import Line

RESAMPLES = 1000
MOST_DRAWS = 10_000_000
"""Clips drawn in all: of a very large set fewer resamples are made, whose interval is narrow and steady."""

FEWEST = 200


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
        return self.bounds[0] > 0 or self.bounds[1] < 0


def difference(pairs: Sequence[tuple[Line, Line]], seed: int = 0) -> Difference | None:
    """Compare two models on the same clips; None: there are no clips, or no words in them.

    The interval is the percentile interval of a paired bootstrap: clips are drawn with replacement, the same for both
    models, and each draw gives one difference (Bisani and Ney, 2004). It is narrower than what the two models' own
    intervals suggest, since a clip that is hard is hard for both.

    Args:
        pairs: each clip as both have heard it.
        seed: of the draws.
    """
    words = sum(old.words for old, _ in pairs)
    if not words:
        return None
    # The same reference may have been normalised by two versions; the second's length is taken for both.
    edits = [(new.errors - old.errors, old.words) for old, new in pairs]
    draw = random.Random(seed)
    resamples = max(FEWEST, min(RESAMPLES, MOST_DRAWS // len(edits)))
    rates = []
    for _ in range(resamples):
        drawn = draw.choices(edits, k=len(edits))
        rates.append(sum(one[0] for one in drawn) / max(1, sum(one[1] for one in drawn)))
    rates.sort()
    return Difference(
        clips=len(pairs),
        before=sum(old.errors for old, _ in pairs) / words,
        after=sum(new.errors for _, new in pairs) / words,
        bounds=(_percentile(rates, 0.025), _percentile(rates, 0.975)),
        better=sum(new.errors < old.errors for old, new in pairs),
        worse=sum(new.errors > old.errors for old, new in pairs),
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
