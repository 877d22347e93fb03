"""Transcribing for trials that train together: those that have the same clips before them share each token's pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.fast.greedy import Rules
from jobs.fast.many import ManyAdapters
from jobs.search.shared.once import Once
from jobs.search.shared.room import clip_by_clip, clips_at_once, for_the_same
from jobs.transcribe import Chunk, Listener

Tokens = list[list[int]]


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
    return for_the_same(wishes, lambda wish: wish.chunk, lambda some: _of_chunk(many, some))


def _of_chunk(many: ManyAdapters, wishes: list[Listen]) -> list[Tokens]:
    """For trials that have the very same clips."""
    first, models = wishes[0], [wish.model for wish in wishes]
    # No inference mode: what a layer computes of its adapters here serves the next training step as well.
    with torch.no_grad(), many.held_for_decoding():
        audio_BPD = many.hear(first.chunk)

        def compute(some: list[Any], clips: slice) -> list[Tokens]:
            return many.decode(some, audio_BPD[clips], first.prompts_BT[clips], first.rules)

        at_once = clips_at_once(audio_BPD, len(models), many.decoder_layers)
        return clip_by_clip(models, slice(0, len(audio_BPD)), at_once, compute)
