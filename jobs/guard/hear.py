"""Transcribing clips of any length with timestamps, greedily: short ones in one window each, long ones by transformers'
sequential long-form decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from jobs.audio import SAMPLE_RATE_HZ
from jobs.batches import read_clip
from jobs.fast.log_mel import LogMel
from jobs.tokens import TIMESTAMP_STEP_S
from jobs.transcribe import generation_arguments, read_ahead, shard
from service.spec.sections import EvaluationConfig

LONG_BATCH = 8
"""Long clips that are decoded at once, at most: all of their features are in memory."""

WINDOWS_TOO_MANY = 10
"""A model whose timestamps take so many times the windows that a clip has does not come to its end."""


@dataclass(frozen=True)
class Piece:
    """What was heard between two timestamps, in seconds; `end_s` is None where the model gave none."""

    start_s: float
    end_s: float | None
    text: str


@dataclass(frozen=True)
class Heard:
    """What a model heard in one row.

    Attributes:
        stuck: its timestamps did not lead to the clip's end, and the transcription was broken off.
    """

    row: int
    pieces: tuple[Piece, ...]
    stuck: bool = False

    @property
    def text(self) -> str:
        """The transcript."""
        return "".join(piece.text for piece in self.pieces).strip()


class _StuckError(Exception):
    """Long-form decoding does not advance."""


class Listener:
    """Transcribes rows with timestamps.

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        processor: its WhisperProcessor.
        settings: batch size and the longest transcript of a window; beams are not used.
        multilingual: whether language and task go to generate().
        log_mel: makes the features of clips of one window; None: on the model's device.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: EvaluationConfig,
        *,
        multilingual: bool,
        log_mel: LogMel | None = None,
    ) -> None:
        self._model, self._extractor, self._tokenizer = model, processor.feature_extractor, processor.tokenizer
        self._settings = settings.model_copy(update={"num_beams": 1})
        self._multilingual = multilingual
        self._log_mel = log_mel or LogMel(self._extractor, model.device)
        no_timestamps = self._tokenizer.convert_tokens_to_ids("<|notimestamps|>")
        # Generation configs of older checkpoints do not name it, and generate() asks for it.
        model.generation_config.no_timestamps_token_id = no_timestamps
        self._first_time = no_timestamps + 1
        self._end = int(self._tokenizer.eos_token_id)

    def hear(
        self, dataset: Any, *, threads: int = 2, progress: Callable[[int], None] = lambda done: None
    ) -> list[Heard]:
        """Transcribe every row.

        Args:
            dataset: rows with path, language, duration_s and, of clips inside a file, start_s and end_s.
            threads: threads that read the next batch while this one is decoded.
            progress: called with the number of rows done.

        Returns:
            what was heard, in the order of the rows.
        """
        window_s = self._extractor.n_samples / SAMPLE_RATE_HZ
        durations = dataset["duration_s"][:]
        order = shard(dataset, 0, 1)
        long = [row for row in order if durations[row] > window_s]
        self._model.eval()
        heard: list[Heard] = []
        with ThreadPoolExecutor(threads, thread_name_prefix="audio") as pool, torch.inference_mode():
            for rows, size, listen in (
                (long, min(LONG_BATCH, self._settings.batch_size), self._listen_long),
                (order[len(long) :], self._settings.batch_size, self._listen),
            ):
                chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
                for chunk, records in read_ahead(pool, lambda chunk: _read(dataset, chunk), chunks):
                    heard += [replace(item, row=row) for row, item in zip(chunk, listen(records), strict=True)]
                    progress(len(heard))
        return sorted(heard, key=lambda item: item.row)

    def _arguments(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        languages = [record["language"] for record in records]
        arguments = generation_arguments(self._settings, languages if self._multilingual else None)
        return arguments | {"return_timestamps": True}

    def _listen(self, records: list[dict[str, Any]]) -> Iterator[Heard]:
        """Clips of one window, each decoded once: transformers would go on into the silence behind them."""
        features_BMF = self._log_mel([record["samples"] for record in records])
        tokens_BT = self._model.generate(
            input_features=features_BMF.to(self._model.device),
            force_unique_generate_call=True,
            **self._arguments(records),
        )
        for tokens in tokens_BT.tolist():
            yield Heard(0, self.pieces(tokens))

    def _listen_long(self, records: list[dict[str, Any]]) -> Iterator[Heard]:
        """Clips of several windows. One that is stuck is found alone, so that the others of its batch are not lost."""
        try:
            segments = self._long_form(records)
        except _StuckError:
            if len(records) == 1:
                yield Heard(0, (), stuck=True)
                return
            for record in records:
                yield from self._listen_long([record])
            return
        for found in segments:
            yield Heard(0, tuple(piece for segment in found if (piece := self._piece(segment)).text.strip()))

    def _long_form(self, records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        inputs = self._extractor(
            [record["samples"] for record in records],
            sampling_rate=SAMPLE_RATE_HZ,
            return_tensors="pt",
            truncation=False,
            padding="longest",
            return_attention_mask=True,
        )
        windows = -(-inputs.input_features.shape[-1] // self._extractor.nb_max_frames)
        calls = 0

        def watch(_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > WINDOWS_TOO_MANY * windows:
                raise _StuckError

        found = self._model.generate(
            input_features=inputs.input_features.to(self._model.device),
            attention_mask=inputs.attention_mask.to(self._model.device),
            condition_on_prev_tokens=False,
            return_segments=True,
            monitor_progress=watch,
            **self._arguments(records),
        )
        return list(found["segments"])

    def _piece(self, segment: dict[str, Any]) -> Piece:
        """A segment of long-form decoding, whose end transformers makes up where the model gave none."""
        tokens = segment["tokens"].tolist()
        ended = bool(tokens) and tokens[-1] >= self._first_time
        end_s = round(float(segment["end"]), 2) if ended else None
        return Piece(round(float(segment["start"]), 2), end_s, self._text(tokens))

    def pieces(self, tokens: list[int]) -> tuple[Piece, ...]:
        """One window's tokens parted at their timestamps; what the prompt holds is passed over."""
        pieces = []
        start_s, words = 0.0, list[int]()
        for token in tokens:
            if token >= self._first_time:
                time_s = round((token - self._first_time) * TIMESTAMP_STEP_S, 2)
                if words:
                    pieces.append(Piece(start_s, time_s, self._text(words)))
                start_s, words = time_s, []
            elif token < self._end:
                words.append(token)
        if words:
            pieces.append(Piece(start_s, None, self._text(words)))
        return tuple(piece for piece in pieces if piece.text.strip())

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([token for token in tokens if token < self._end]))


def _read(dataset: Any, rows: list[int]) -> list[dict[str, Any]]:
    records = [dataset[row] for row in rows]
    return [record | {"samples": read_clip(record)} for record in records]
