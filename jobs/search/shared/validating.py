"""The validation loss of trials that train together: those that come to the same clips have them computed as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jobs.batches import Batch
from jobs.fast.many import ManyAdapters
from jobs.search.shared.room import clip_by_clip, clips_at_once, for_the_same

_LAYERS = 1
"""Of the decoder, whose keys and values are held at one time: there are no tokens to come."""


@dataclass(frozen=True)
class Validate:
    """A trial that wants to know its loss on a batch, summed over the label tokens."""

    model: Any
    batch: Batch


def validate(many: ManyAdapters, wishes: Sequence[Validate]) -> list[float]:
    """The losses that several trials want to know.

    Args:
        many: what computes.
        wishes: of trials, each of which has one.
    """
    return for_the_same(wishes, lambda wish: wish.batch, lambda some: _of_batch(many, some))


def _of_batch(many: ManyAdapters, wishes: list[Validate]) -> list[float]:
    """Of trials that have the very same batch."""
    batch, models = wishes[0].batch, [wish.model for wish in wishes]
    audio_BPD = many.hear(batch)

    def compute(some: list[Any], clips: slice) -> list[list[float]]:
        return many.losses(some, audio_BPD[clips], batch.inputs_BT[clips], batch.labels_BT[clips])

    at_once = clips_at_once(audio_BPD, len(models), _LAYERS)
    return [sum(each) for each in clip_by_clip(models, slice(0, len(audio_BPD)), at_once, compute)]
