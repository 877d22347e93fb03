"""Transcripts to decoder tokens, the way Whisper was trained."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.manifest.row import Row
from service.errors import Fault, SpecError
from service.spec.languages import LANGUAGES, WITHOUT_SPACES

IGNORE = -100
"""Label id that the cross-entropy leaves out."""


@dataclass(frozen=True)
class Tokens:
    """What the decoder reads and what it must say, both T tokens long."""

    inputs: list[int]
    labels: list[int]


class Prompter:
    """Builds the decoder's tokens for a row: start, language, task, no timestamps, text, end.

    Args:
        tokenizer: a WhisperTokenizer.
        multilingual: whether the checkpoint has language and task tokens (`.en` ones have none).
        max_tokens: the decoder's positions (448 for every released checkpoint).
    """

    def __init__(self, tokenizer: Any, *, multilingual: bool, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.multilingual = multilingual
        self.max_tokens = max_tokens
        self._eot = int(tokenizer.eos_token_id)
        self._controls = set(tokenizer.get_added_vocab())

    def _id(self, token: str) -> int:
        found = self._tokenizer.convert_tokens_to_ids(token)
        # An unknown token comes back as the end token, without an error.
        if found is None or (found == self._eot and token != "<|endoftext|>"):
            raise SpecError([Fault("training.base_model", f"its tokenizer has no token {token}")])
        return int(found)

    def knows_language(self, language: str) -> bool:
        """Whether the checkpoint has a token for that language (an English-only one knows `en`)."""
        if not self.multilingual:
            return language == "en"
        # Not by the token alone: `transcribe` and `0.00` have one too.
        return language in LANGUAGES and f"<|{language}|>" in self._controls

    def control_token(self, text: str) -> str | None:
        """The first control token, such as `<|endoftext|>`, that the tokenizer would read in a transcript."""
        return next((token for token in re.findall(r"<\|[^<>|]*\|>", text) if token in self._controls), None)

    def prompt(self, language: str) -> list[int]:
        """The tokens before the text."""
        start, plain = self._id("<|startoftranscript|>"), self._id("<|notimestamps|>")
        if not self.multilingual:
            return [start, plain]
        return [start, self._id(f"<|{language}|>"), self._id("<|transcribe|>"), plain]

    def encode(self, text: str, language: str) -> Tokens:
        """Tokens of one transcript. The labels begin after the start token, so nothing has to be shifted later."""
        text = text.strip() if language in WITHOUT_SPACES else f" {text.strip()}"
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        sequence = [*self.prompt(language), *ids, self._eot]
        return Tokens(sequence[:-1], sequence[1:])

    def count(self, row: Row) -> int:
        """Decoder positions that a row of a manifest takes."""
        return len(self.encode(row.text, row.language).inputs)


def pad(rows: list[Tokens], fill: int) -> tuple[Tensor, Tensor]:
    """Stack rows into one right-padded batch. Labels are masked by length: Whisper's padding token is its end token.

    Args:
        rows: B rows of 1..T tokens.
        fill: id put where the decoder's input has ended; nothing attends to it, since the decoder is causal.

    Returns:
        int64 inputs (B, T) and labels (B, T).
    """
    longest = max(len(row.inputs) for row in rows)
    inputs_BT = torch.full((len(rows), longest), fill)
    labels_BT = torch.full((len(rows), longest), IGNORE)
    for index, row in enumerate(rows):
        inputs_BT[index, : len(row.inputs)] = torch.tensor(row.inputs)
        labels_BT[index, : len(row.labels)] = torch.tensor(row.labels)
    return inputs_BT, labels_BT
