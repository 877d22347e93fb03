"""Transcribing clips by generation, in large batches sorted by length."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from jobs.batches import Features, features_or_heard
from jobs.fast.encoder_outputs import Heard, SplitOutputs
from jobs.fast.log_mel import LogMel
from jobs.train.step import encode_by
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
) -> Generator[Hypothesis]:
    """Transcribe rows in the order given (sort them by length: a batch decodes until its longest text has ended).

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        processor: its WhisperProcessor.
        dataset: rows with `path` and `language`.
        rows: which of them.
        settings: batch size, beams and the longest transcript.
        multilingual: whether language and task go to generate().
        threads: threads that read the next batch while this one is decoded.
        progress: called with the number of rows done.
        outputs: encoder outputs of the dataset's rows, where the model's encoder is the one that made them.
        features: makes features of rows; None: on the model's device, of clips that are decoded.
    """
    device = next(model.parameters()).device
    made = features or Features(LogMel(processor.feature_extractor, device))
    size = settings.batch_size
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    was_training = model.training
    model.eval()
    done = 0

    def read(chunk: list[int]) -> tuple[Tensor, Heard | None, list[str]]:
        records = [dataset[row] for row in chunk]
        features_BMF, heard = features_or_heard(made, records, chunk, outputs)
        return features_BMF, heard, [record["language"] for record in records]

    def inputs(features_BMF: Tensor, heard: Heard | None) -> dict[str, Any]:
        if heard is None:
            return {"input_features": features_BMF.to(device)}
        return {"encoder_outputs": BaseModelOutput(heard.complete(features_BMF, encode_by(model)))}

    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="audio") as pool:
            for chunk, (features_BMF, heard, languages) in read_ahead(pool, read, chunks):
                with torch.inference_mode():
                    tokens_BT = model.generate(
                        **inputs(features_BMF, heard),
                        **generation_arguments(settings, languages if multilingual else None),
                    )
                texts = processor.batch_decode(tokens_BT, skip_special_tokens=True)
                done += len(chunk)
                progress(done)
                for row, text in zip(chunk, texts, strict=True):
                    yield Hypothesis(row, text.strip())
    finally:
        model.train(was_training)


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
