"""Transcripts to decoder tokens, the way Whisper was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.manifest.row import Row, Segment
from jobs.manifest.rows import parse_segments
from service.errors import Fault, SpecError
from service.spec.languages import LANGUAGES, WITHOUT_SPACES

IGNORE = -100
"""Label id that the cross-entropy leaves out."""

TIMESTAMP_STEP_S, LAST_TIMESTAMP = 0.02, 1500
"""Whisper's timestamps: <|0.00|>, <|0.02|>, ... <|30.00|>."""


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
        return self.encode_texts([text], language)

    def encode_texts(self, texts: Sequence[str], language: str) -> Tokens:
        """Tokens of transcripts that follow each other in one window.

        Each text has its own ids. Where words are written apart these are the ids of the joined text; elsewhere the
        border of two texts stays one of tokens too. So a window has as many tokens as its texts have.
        """
        ids = [token for text in texts for token in self._text_ids(text, language)]
        return self._tokens([*self.prompt(language), *ids])

    def encode_segments(self, segments: Sequence[Segment], language: str) -> Tokens:
        """Tokens of one transcript with timestamps: each segment between the tokens of its begin and its end.

        Args:
            segments: in order, with times from the clip's begin.
            language: Whisper's code.
        """
        sequence = self.prompt(language)[:-1]
        for segment in segments:
            words = self._text_ids(segment.text, language)
            sequence += [self._time_id(segment.start_s), *words, self._time_id(segment.end_s)]
        return self._tokens(sequence)

    def encode_no_speech(self) -> Tokens:
        """Tokens of a clip in which nothing is said: the no-speech token where the language would stand."""
        return self._tokens([self._id("<|startoftranscript|>"), self._no_speech_id()])

    def encode_row(self, record: Mapping[str, Any], *, timestamps: bool = False, speed: float = 1.0) -> Tokens:
        """Tokens of a prepared row.

        Args:
            record: with text, language and, where it has them, segments and no_speech.
            timestamps: with the times of its segments, if it has any.
            speed: at which its audio is played: times are divided by it.
        """
        if record.get("no_speech"):
            return self.encode_no_speech()
        if timestamps and (segments := segments_of(record, speed=speed)):
            return self.encode_segments(segments, record["language"])
        return self.encode(record["text"], record["language"])

    def _tokens(self, sequence: list[int]) -> Tokens:
        return Tokens(sequence, [*sequence[1:], self._eot])

    def _text_ids(self, text: str, language: str) -> list[int]:
        text = text.strip() if language in WITHOUT_SPACES else f" {text.strip()}"
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _time_id(self, seconds: float) -> int:
        # Not every tokenizer names the timestamps, but they all follow this token, in steps of 20 ms up to 30 s.
        return self._id("<|notimestamps|>") + 1 + min(LAST_TIMESTAMP, max(0, round(seconds / TIMESTAMP_STEP_S)))

    def _no_speech_id(self) -> int:
        # Older checkpoints call it by the name that it had in a draft of OpenAI's code.
        return self._id("<|nospeech|>" if "<|nospeech|>" in self._controls else "<|nocaptions|>")

    def count(self, row: Row, *, timestamps: bool = True) -> int:
        """Decoder positions that a row of a manifest takes at most: with the times of its segments, if it has any."""
        if row.no_speech:
            return len(self.encode_no_speech().inputs)
        plain = len(self.encode(row.text, row.language).inputs)
        if not (timestamps and row.segments):
            return plain
        return max(plain, len(self.encode_segments(row.segments, row.language).inputs))


def segments_of(record: Mapping[str, Any], *, speed: float = 1.0, begin_s: float = 0.0) -> list[Segment]:
    """A prepared row's segments, if it has any, as it is played at that speed and from that second of its window on."""
    if not record.get("segments"):
        return []
    segments = parse_segments(json.loads(record["segments"]))
    return [Segment(begin_s + s.start_s / speed, begin_s + s.end_s / speed, s.text) for s in segments]


def pad(rows: list[Tokens], fill: int, width: int = 0) -> tuple[Tensor, Tensor]:
    """Stack rows into one right-padded batch. Labels are masked by length: Whisper's padding token is its end token.

    Args:
        rows: B rows of 1..T tokens.
        fill: id put where the decoder's input has ended; nothing attends to it, since the decoder is causal.
        width: the least T.

    Returns:
        int64 inputs (B, T) and labels (B, T).
    """
    longest = max(width, *(len(row.inputs) for row in rows))
    inputs_BT = torch.full((len(rows), longest), fill)
    labels_BT = torch.full((len(rows), longest), IGNORE)
    for index, row in enumerate(rows):
        inputs_BT[index, : len(row.inputs)] = torch.tensor(row.inputs)
        labels_BT[index, : len(row.labels)] = torch.tensor(row.labels)
    return inputs_BT, labels_BT
