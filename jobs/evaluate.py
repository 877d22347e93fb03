"""Scoring a model on a split: every worker transcribes its share, all of them know the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jobs import distributed
from jobs.batches import Features
from jobs.fast.encoder_outputs import SplitOutputs
from jobs.score import Scorer, Utterance, summarise
from jobs.transcribe import Listener, shard, transcribe
from service.errors import JobFailedError, StoppedError
from service.spec.sections import EvaluationConfig


def evaluate(
    model: Any,
    processor: Any,
    dataset: Any,
    settings: EvaluationConfig,
    *,
    scorer: Scorer,
    multilingual: bool,
    rank: int = 0,
    workers: int = 1,
    threads: int = 2,
    bootstrap: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stopping: Callable[[], bool] = lambda: False,
    outputs: SplitOutputs | None = None,
    features: Features | None = None,
    listener: Listener | None = None,
) -> tuple[list[Utterance], dict[str, Any]]:
    """Transcribe and score a split with all workers.

    Args:
        model: a Whisper model or a PeftModel around one.
        processor: its WhisperProcessor.
        dataset: rows with path, text, language and duration_s.
        settings: batch size, beams, longest transcript, bootstrap.
        scorer: compares transcripts with the rows' texts.
        multilingual: whether the checkpoint has language tokens.
        rank: this worker's number.
        workers: number of workers; each of them makes this call.
        threads: threads that read audio.
        bootstrap: resamples, where other than the settings say.
        progress: called with (rows done, rows); for the other workers, this one's pace is taken.
        stopping: whether to stop; all workers do as soon as one is told so.
        outputs: encoder outputs of the split, where the model's encoder is the one that made them.
        features: makes features of rows; None: on the model's device, of clips that are decoded.
        listener: makes tokens of clips; None: as the settings say.

    Returns:
        every row's utterance in the order of the split, and the summary of `jobs.score.summarise`.

    Raises:
        StoppedError: a worker was told to stop.
    """
    rows = shard(dataset, rank, workers)
    hypotheses = transcribe(
        model,
        processor,
        dataset,
        rows,
        settings,
        multilingual=multilingual,
        threads=threads,
        progress=lambda done: progress(min(done * workers, len(dataset)), len(dataset)),
        outputs=outputs,
        features=features,
        listener=listener,
    )
    heard, stopped = [], stopping()
    while not stopped and (item := next(hypotheses, None)) is not None:
        heard.append((item.row, item.text))
        stopped = stopping()
    hypotheses.close()
    # Workers hear of a stop at different times, and must all leave by the same way.
    shares = distributed.gather([(stopped, heard)])
    if any(share[0] for share in shares):
        raise StoppedError("stopped while a model was scored")
    everything = sorted(pair for _, share in shares for pair in share)
    if [row for row, _ in everything] != list(range(len(dataset))):
        raise JobFailedError(f"evaluation: {len(everything)} transcripts of {len(dataset)} rows came back")
    utterances = [scorer.score(dataset[row], text) for row, text in everything]
    resamples = settings.bootstrap if bootstrap is None else bootstrap
    return utterances, summarise(utterances, bootstrap=resamples)


def to_lines(utterances: list[Utterance]) -> str:
    """Utterances as JSON lines."""
    return "".join(json.dumps(utterance.as_dict(), ensure_ascii=False) + "\n" for utterance in utterances)


def from_lines(text: str) -> list[Utterance]:
    """Inverse of `to_lines`."""
    # Not splitlines(): a transcript may hold U+2028 and its like, which JSON leaves as they are.
    return [Utterance.from_dict(json.loads(line)) for line in text.split("\n") if line]
