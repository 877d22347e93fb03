"""Scoring any Whisper checkpoint, PEFT adapter or run on the rows of a job, in Ray tasks."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from jobs.adapter import load_adapter
from jobs.batches import Features, Loader
from jobs.device import autocast, device_of, set_threads
from jobs.evaluate import to_lines
from jobs.fast.adapters import speed_up
from jobs.fast.log_mel import log_mel_of
from jobs.model import load_whisper
from jobs.prepare import fetch_rows
from jobs.score import Scorer, Utterance, summarise
from jobs.sources import open_source
from jobs.transcribe import shard, transcribe
from service.artifacts import MODEL_LINES
from service.spec.job import JobSpec
from service.storage import Storage


def score_shard(
    spec_json: str, root: str, model: dict[str, Any], rank: int, workers: int, log: Any
) -> list[dict[str, Any]]:
    """Transcribe and score one worker's share of the rows; runs as a Ray task."""
    spec = JobSpec.model_validate_json(spec_json)
    set_threads(spec)
    rows = Dataset.from_file(fetch_rows(Storage(root), "val"))
    source = open_source(model)
    whisper = load_whisper(source.base, source.revision, attention=spec.engine.attention)
    scored = load_adapter(whisper.model, source.adapter) if source.adapter else whisper.model
    speed_up(scored, spec.engine)
    mine = shard(rows, rank, workers)

    def progress(done: int) -> None:
        if rank == 0:
            seen = min(done * workers, len(rows))
            log.emit.remote({"event": "transcribed", "what": "clips", "done": seen, "total": len(rows)})

    scorer = Scorer.of(spec, whisper.processor)
    with autocast(spec):
        heard = list(
            transcribe(
                scored.to(device_of(spec)),
                whisper.processor,
                rows,
                mine,
                spec.evaluation,
                multilingual=whisper.multilingual,
                threads=spec.data.threads,
                progress=progress,
                features=Features(log_mel_of(spec, whisper.processor)),
            )
        )
    return [scorer.score(rows[item.row], item.text).as_dict() | {"row": item.row} for item in heard]


def loss_of(spec_json: str, root: str, model: dict[str, Any]) -> float:
    """Mean loss per label token of a checkpoint on the validation set; runs as a Ray task."""
    from jobs.train.session import LocalSession
    from jobs.train.validation import loss_by, validation_loss

    spec = JobSpec.model_validate_json(spec_json)
    set_threads(spec)
    rows = Dataset.from_file(fetch_rows(Storage(root), "val"))
    whisper = load_whisper(model["base"], model["revision"], attention=spec.engine.attention)
    loader = Loader(
        rows,
        Features(log_mel_of(spec, whisper.processor)),
        whisper.prompter(),
        threads=spec.data.threads,
        prefetch=spec.data.prefetch,
    )
    device = device_of(spec)
    with autocast(spec), loss_by(whisper.model.to(device), spec) as of_batch:
        return validation_loss(of_batch, rows, loader, spec, LocalSession(), device)


def collect(
    spec: JobSpec, root: Storage, shards: list[list[dict[str, Any]]], lines_to: str = MODEL_LINES
) -> dict[str, Any]:
    """Join the workers' shares, keep every utterance, and sum up."""
    lines = sorted((line for part in shards for line in part), key=lambda line: int(line["row"]))
    utterances = [Utterance.from_dict(line) for line in lines]
    root.write_text(lines_to, to_lines(utterances))
    return summarise(utterances, bootstrap=spec.evaluation.bootstrap)
