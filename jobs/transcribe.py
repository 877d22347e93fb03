"""Transcribing clips by generation, in large batches sorted by length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from jobs.batches import Features, features_or_heard
from jobs.fast.encoder_outputs import Heard, SplitOutputs
from jobs.fast.fold import folded
from jobs.fast.greedy import Rules, decode, why_not
from jobs.fast.log_mel import LogMel
from jobs.halves import in_halves
from jobs.model import whisper_of
from jobs.tokens import Prompter
from jobs.train.step import encode_by, encoder_output
from service.spec.sections import EvaluationConfig


@dataclass(frozen=True)
class Hypothesis:
    """What a model heard in one row."""

    row: int
    text: str


def shard(dataset: Any, rank: int, workers: int) -> list[int]:
    """The rows that one worker transcribes, longest first, dealt out in turn so that all have about as much to do."""
    durations = dataset["duration_s"][:]  # the column at once: by the row it takes fifty times as long
    longest_first = sorted(range(len(durations)), key=lambda row: (-durations[row], row))
    return longest_first[rank::workers]


def transcribe(
    model: Any,
    processor: Any,
    dataset: Any,
    rows: list[int],
    settings: EvaluationConfig,
    *,
    multilingual: bool,
    threads: int = 2,
    progress: Callable[[int], None] = lambda done: None,
    outputs: SplitOutputs | None = None,
    features: Features | None = None,
    listener: Listener | None = None,
) -> Generator[Hypothesis]:
    """Transcribe rows in the order given (sort them by length: a batch decodes until its longest text has ended).

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        processor: its WhisperProcessor.
        dataset: rows with `path` and `language`.
        rows: which of them.
        settings: batch size, beams, the longest transcript, and whether the fast way may be taken.
        multilingual: whether the checkpoint has language and task tokens.
        threads: threads that read the next batch while this one is decoded.
        progress: called with the number of rows done.
        outputs: encoder outputs of the dataset's rows, where the model's encoder is the one that made them.
        features: makes features of rows; None: on the model's device, of clips that are decoded.
        listener: makes tokens of them; None: the fast way where it may be taken, else generate().
    """
    if listener is not None:
        listen: Listener = listener
    elif settings.fast_decoding and why_not(model, settings.num_beams) is None:
        listen = Greedy(model, processor, settings, multilingual=multilingual)
    else:
        listen = Generate(model, settings, multilingual=multilingual)
    made = features or Features(LogMel(processor.feature_extractor, next(model.parameters()).device))
    size = settings.batch_size
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    was_training = model.training
    model.eval()
    done = 0

    def make(chunk: list[int]) -> Chunk:
        records = [dataset[row] for row in chunk]
        features_BMF, heard = features_or_heard(made, records, chunk, outputs)
        return Chunk(features_BMF, heard, [record["language"] for record in records])

    def read(chunk: list[int]) -> Chunk:
        return listen.read(chunk, make)

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="audio") as pool, listen.ready():
            for chunk, clips in read_ahead(pool, read, chunks):
                with torch.inference_mode():
                    texts = processor.batch_decode(listen(clips), skip_special_tokens=True)
                done += len(chunk)
                progress(done)
                for row, text in zip(chunk, texts, strict=True):
                    yield Hypothesis(row, text.strip())
    finally:
        model.train(was_training)


@dataclass(frozen=True, eq=False)
class Chunk:
    """B clips that were read.

    Attributes:
        features_BMF: of all of them or, with `heard`, of those that are missing in it.
        heard: the encoder's outputs, as far as they are kept.
        languages: of each clip.
    """

    features_BMF: Tensor
    heard: Heard | None
    languages: list[str]


class Listener(ABC):
    """Makes tokens of clips."""

    def read(self, rows: list[int], make: Callable[[list[int]], Chunk]) -> Chunk:
        """The clips of rows, as `make` reads them."""
        return make(rows)

    def ready(self) -> AbstractContextManager[None]:
        """What is to be done around all calls."""
        return nullcontext()

    @abstractmethod
    def __call__(self, clips: Chunk) -> list[list[int]]:
        """Tokens of each clip."""


class Generate(Listener):
    """transformers' generate().

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        settings: beams and the longest transcript.
        multilingual: whether language and task go to generate().
    """

    def __init__(self, model: Any, settings: EvaluationConfig, *, multilingual: bool) -> None:
        self._model, self._settings, self._multilingual = model, settings, multilingual

    def __call__(self, clips: Chunk) -> list[list[int]]:
        """See Listener."""
        if clips.heard is None:
            device = next(self._model.parameters()).device
            audio: dict[str, Any] = {"input_features": clips.features_BMF.to(device)}
        else:
            heard_BPD = clips.heard.complete(clips.features_BMF, encode_by(self._model))
            audio = {"encoder_outputs": BaseModelOutput(heard_BPD)}
        arguments = generation_arguments(self._settings, clips.languages if self._multilingual else None)
        # One pass over a window: where two timestamps come in a row, transformers would begin anew behind them, and
        # with kept encoder outputs at the window's begin.
        tokens: list[list[int]] = self._model.generate(**audio, force_unique_generate_call=True, **arguments).tolist()
        return tokens


class Greedy(Listener):
    """Our greedy decoder, with adapters folded into weights.

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        processor: its WhisperProcessor.
        settings: the longest transcript.
        multilingual: whether the checkpoint has language and task tokens.
    """

    def __init__(self, model: Any, processor: Any, settings: EvaluationConfig, *, multilingual: bool) -> None:
        self._model = model
        self._rules = Rules.of(model, settings.max_new_tokens)
        self._prompts = Prompts(model, processor, multilingual=multilingual)

    def ready(self) -> AbstractContextManager[None]:
        """See Listener."""
        return folded(self._model)

    def __call__(self, clips: Chunk) -> list[list[int]]:
        """See Listener."""
        audio_BPD = encoder_output(self._model, clips.features_BMF, clips.heard)
        prompts_BT = self._prompts(clips.languages)
        parts = in_halves(
            lambda part: decode(self._model, audio_BPD[part], prompts_BT[part], self._rules), slice(0, len(audio_BPD))
        )
        return [tokens for found in parts for tokens in found]


class Prompts:
    """The tokens before transcripts.

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        processor: its WhisperProcessor.
        multilingual: whether the checkpoint has language and task tokens.
    """

    def __init__(self, model: Any, processor: Any, *, multilingual: bool) -> None:
        self._device = next(model.parameters()).device
        positions = int(whisper_of(model).config.max_target_positions)
        self._prompter = Prompter(processor.tokenizer, multilingual=multilingual, max_tokens=positions)

    def __call__(self, languages: list[str]) -> Tensor:
        """Of clips in these languages (B, T)."""
        return torch.tensor([self._prompter.prompt(code) for code in languages], device=self._device)


def read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[list[int]], Any], chunks: list[list[int]]
) -> Iterator[tuple[list[int], Any]]:
    """Each chunk with what `read` made of it, the next one being read meanwhile."""
    waiting: deque[tuple[list[int], Future[Any]]] = deque()
    for chunk in chunks:
        waiting.append((chunk, pool.submit(read, chunk)))
        if len(waiting) > 1:
            ready, future = waiting.popleft()
            yield ready, future.result()
    for ready, future in waiting:
        yield ready, future.result()


def generation_arguments(settings: EvaluationConfig, languages: list[str] | None) -> dict[str, Any]:
    """Arguments of generate(): greedy unless beams are asked for, no timestamps, one language per row."""
    arguments: dict[str, Any] = {
        "do_sample": False,
        "num_beams": settings.num_beams,
        "max_new_tokens": settings.max_new_tokens,
        "return_timestamps": False,
    }
    if languages is not None:
        arguments |= {"language": languages, "task": "transcribe"}
    return arguments
