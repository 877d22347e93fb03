"""The loss on the validation set: what a training is judged by where no transcript is made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from jobs import distributed
from jobs.batches import Loader, label_tokens
from jobs.train.session import Session
from jobs.train.step import forward_loss
from jobs.transcribe import read_ahead, shard
from service.errors import StoppedError
from service.spec.job import JobSpec


def validation_loss(model: Any, dataset: Any, loader: Loader, spec: JobSpec, session: Session) -> float:
    """Mean cross-entropy per label token, of all workers together; clips as they are, no dropout.

    Args:
        model: a Whisper model or a PeftModel around one.
        dataset: the validation set.
        loader: makes batches of it.
        spec: its batch size, threads and whether the encoder is frozen.
        session: who the other workers are; each of them makes this call.

    Raises:
        StoppedError: a worker was told to stop.
    """
    device = next(model.parameters()).device
    rows, size = shard(dataset, session.rank, session.workers), spec.evaluation.batch_size
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    frozen = spec.training.freeze_encoder
    was_training, total, tokens, stopped = model.training, 0.0, 0, session.stopping()
    model.eval()
    try:
        with ThreadPoolExecutor(spec.data.threads, thread_name_prefix="audio") as pool, torch.no_grad():
            for done, (_, batch) in enumerate(read_ahead(pool, loader.make, [] if stopped else chunks), 1):
                loss = forward_loss(model, batch, device, freeze_encoder=frozen, fast_loss=spec.engine.fast_loss)
                total += float(loss)
                tokens += label_tokens([batch])
                seen = min(done * size * session.workers, len(dataset))
                session.emit({"event": "transcribed", "what": "validation", "done": seen, "total": len(dataset)})
                if stopped := session.stopping():
                    break
    finally:
        model.train(was_training)
    # Workers hear of a stop at different times, and must all leave by the same way.
    total, count, stops = distributed.sum_numbers([total, tokens, stopped], device)
    if stops:
        raise StoppedError("stopped while the validation set was scored")
    return total / count
