"""Transcribing for trials that train together: those that have the same clips before them share each token's pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.fast.greedy import Rules
from jobs.fast.many import ManyAdapters
from jobs.search.shared.once import Once
from jobs.transcribe import Chunk, Listener

Tokens = list[list[int]]

_FREE_SHARE = 0.5
"""Of a GPU's free memory, what keys and values of the audio may take: a decoder needs more than those."""


@dataclass(frozen=True)
class Listen:
    """What a trial wants to have transcribed."""

    model: Any
    chunk: Chunk
    prompts_BT: Tensor
    rules: Rules


class Together(Listener):
    """Has clips transcribed with those of the other trials.

    Args:
        ask: does it; takes what is wanted and gives tokens.
        model: the trial's PeftModel.
        prompts: makes prompts of languages.
        rules: what bounds a transcript.
        chunks: what was read, for all trials.
    """

    def __init__(
        self,
        ask: Callable[[Listen], Tokens],
        model: Any,
        prompts: Callable[[list[str]], Tensor],
        rules: Rules,
        chunks: Once[Chunk],
    ) -> None:
        self._ask, self._model, self._prompts, self._rules, self._chunks = ask, model, prompts, rules, chunks

    def read(self, rows: list[int], make: Callable[[list[int]], Chunk]) -> Chunk:
        """See Listener. Trials that come to the same rows get the very same chunk."""
        return self._chunks.get(tuple(rows), lambda: make(rows))

    def __call__(self, clips: Chunk) -> Tokens:
        """See Listener."""
        return self._ask(Listen(self._model, clips, self._prompts(clips.languages), self._rules))


def listen(many: ManyAdapters, wishes: Sequence[Listen]) -> list[Tokens]:
    """Transcribe what several trials want: one after the other, the same clips for all that have them.

    Args:
        many: what computes.
        wishes: of trials, each of which has one.
    """
    groups: dict[int, list[int]] = {}
    for place, wish in enumerate(wishes):
        groups.setdefault(id(wish.chunk), []).append(place)
    found: list[Tokens] = [[] for _ in wishes]
    for places in groups.values():
        first = wishes[places[0]]
        models = [wishes[place].model for place in places]
        # No inference mode: what a layer computes of its adapters here serves the next training step as well.
        with torch.no_grad():
            audio_BPD = many.hear(first.chunk)
            texts = _decode(many, models, audio_BPD, first.prompts_BT, first.rules)
        for place, text in zip(places, texts, strict=True):
            found[place] = text
    return found


def _decode(many: ManyAdapters, models: list[Any], audio_BPD: Tensor, prompts_BT: Tensor, rules: Rules) -> list[Tokens]:
    """As many clips at once as there is room for; where memory is short all the same, in halves."""
    size = _clips_at_once(many, len(models), audio_BPD)
    if size < len(audio_BPD):
        return _in_parts(many, models, audio_BPD, prompts_BT, rules, size)
    with suppress(torch.OutOfMemoryError):
        return many.decode(models, audio_BPD, prompts_BT, rules)
    torch.cuda.empty_cache()
    if len(audio_BPD) > 1:
        return _in_parts(many, models, audio_BPD, prompts_BT, rules, (len(audio_BPD) + 1) // 2)
    if len(models) == 1:
        return many.decode(models, audio_BPD, prompts_BT, rules)
    half = len(models) // 2
    return [
        text for part in (models[:half], models[half:]) for text in _decode(many, part, audio_BPD, prompts_BT, rules)
    ]


def _in_parts(
    many: ManyAdapters, models: list[Any], audio_BPD: Tensor, prompts_BT: Tensor, rules: Rules, size: int
) -> list[Tokens]:
    found: list[Tokens] = [[] for _ in models]
    for audio, prompts in zip(audio_BPD.split(size), prompts_BT.split(size), strict=True):
        for texts, more in zip(found, _decode(many, models, audio, prompts, rules), strict=True):
            texts.extend(more)
    return found


def _clips_at_once(many: ManyAdapters, models: int, audio_BPD: Tensor) -> int:
    """Clips whose keys and values fit for all models. A CPU is no faster with more rows than one model's."""
    clips, positions, width = audio_BPD.shape
    if audio_BPD.device.type == "cpu":
        return max(1, clips // models)
    of_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + of_torch
    each = 2 * many.decoder_layers * positions * width * audio_BPD.element_size() * models
    return max(1, int(_FREE_SHARE * free / each))
