"""How many clips several trials can have computed at once, and what to do where memory is short all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Wish = TypeVar("Wish")

Compute = Callable[[list[Any], slice], list[list[T]]]
"""Takes some of the trials' models and some of the clips; gives, for each model, one thing for each clip."""

_FREE_SHARE = 0.5
"""Of a GPU's free memory, what keys and values of the audio may take: a decoder needs more than those."""


def for_the_same(
    wishes: Sequence[Wish], clips_of: Callable[[Wish], Any], compute: Callable[[list[Wish]], list[T]]
) -> list[T]:
    """What is computed for each wish, for all that have the very same clips together.

    Args:
        wishes: of trials, each of which has one.
        clips_of: the clips of one.
        compute: does it for those that have the same.
    """
    groups: dict[int, list[int]] = {}
    for place, wish in enumerate(wishes):
        groups.setdefault(id(clips_of(wish)), []).append(place)
    found: dict[int, T] = {}
    for places in groups.values():
        found |= zip(places, compute([wishes[place] for place in places]), strict=True)
    return [found[place] for place in range(len(wishes))]


def clips_at_once(audio_BPD: Tensor, models: int, layers: int) -> int:
    """Clips whose keys and values fit for all models.

    Args:
        audio_BPD: what the encoder made of clips.
        models: how many there are.
        layers: of the decoder, those whose keys and values are held at one time.
    """
    clips, positions, width = audio_BPD.shape
    if audio_BPD.device.type == "cpu":
        return max(1, clips // models)  # with more rows than one model's it is no faster
    of_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + of_torch
    each = 2 * layers * positions * width * audio_BPD.element_size() * models
    return max(1, int(_FREE_SHARE * free / each))


def clip_by_clip(models: list[Any], clips: slice, at_once: int, compute: Compute[T]) -> list[list[T]]:
    """What is computed of clips for each model, as many at once as there is room for; where memory is short all the
    same, in halves.

    Args:
        models: of some trials.
        clips: from where to where.
        at_once: as many of them as there should be room for.
        compute: does it.
    """
    count = clips.stop - clips.start
    if count > at_once:
        parts = [slice(start, min(start + at_once, clips.stop)) for start in range(clips.start, clips.stop, at_once)]
        return _joined(clip_by_clip(models, part, at_once, compute) for part in parts)
    with suppress(torch.OutOfMemoryError):
        return compute(models, clips)
    torch.cuda.empty_cache()
    if count > 1:
        return clip_by_clip(models, clips, (count + 1) // 2, compute)
    if len(models) == 1:
        return compute(models, clips)
    half = len(models) // 2
    return [found for part in (models[:half], models[half:]) for found in clip_by_clip(part, clips, 1, compute)]


def _joined(parts: Iterable[list[list[T]]]) -> list[list[T]]:
    """Of each model, what was found of all clips."""
    return [[each for found in of_model for each in found] for of_model in zip(*parts, strict=True)]
